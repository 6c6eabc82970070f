"""What plugin authors test with: conformance suites, and a private PostgreSQL server."""
