"""The training loop every recipe shares: Lightning with our data, schedules, records and error messages."""
