"""What every room stands on: errors, the store, versions of code, the machine."""
