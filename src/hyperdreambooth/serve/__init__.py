"""The service: jobs over HTTP, kept in a database, done by one warm process a device."""
