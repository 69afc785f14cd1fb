"""Which window of which request comes next: `window` plans one request, `scheduler` the batch."""
