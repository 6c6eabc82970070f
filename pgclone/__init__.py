"""Clone the Postgres databases of a Django project."""
