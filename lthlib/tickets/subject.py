from lthlib.tickets.predictions import Subject  # noqa
