"""From tickets to tables: evaluations, recorded results, the verdict."""
