"""Django's settings for the tests. The session's server is filled in by fixtures.py, for child processes too."""

import json
import os

SECRET_KEY = "not a secret"
USE_TZ = True
DEFAULT_AUTO_FIELD = "django.db.models.BigAutoField"
INSTALLED_APPS = [
    "django.contrib.admin",
    "django.contrib.auth",
    "django.contrib.contenttypes",
    "django.contrib.messages",
    "django.contrib.sessions",
    "pgclone",
    "tests.app",
]
MIDDLEWARE = [
    "django.contrib.sessions.middleware.SessionMiddleware",
    "django.contrib.auth.middleware.AuthenticationMiddleware",
    "django.contrib.messages.middleware.MessageMiddleware",
]
TEMPLATES = [
    {
        "BACKEND": "django.template.backends.django.DjangoTemplates",
        "APP_DIRS": True,
        "OPTIONS": {
            "context_processors": [
                "django.template.context_processors.request",
                "django.contrib.auth.context_processors.auth",
                "django.contrib.messages.context_processors.messages",
            ]
        },
    }
]
DATABASES = {
    "default": {
        "ENGINE": "django.db.backends.postgresql",
        "NAME": "app",
        **json.loads(os.environ.get("PGCLONE_TEST_DATABASE", "{}")),
    }
}

# What a test sets for a child process: {"PGCLONE_INSTANCE": "prod"}.
globals().update(json.loads(os.environ.get("PGCLONE_TEST_SETTINGS", "{}")))

if large := os.environ.get("PGCLONE_TEST_LARGE"):
    # The bytes from which a table is worth parts, and those of a chunk, so that tests need no large tables.
    from pgclone import plan

    plan.LARGE = plan.SMALL_CHUNK = int(large)

if os.environ.get("PGCLONE_TEST_DRIVER") == "psycopg2":
    import sys

    sys.modules["psycopg"] = None
