"""The HTTP server: jobs in SQLite, one worker process per device, FastAPI in front (extra `serve`)."""
