"""What all tests share, those of the plugins in pgclone_s3/ and pgclone_gcs/ too."""

import pytest

pytest_plugins = ["tests.fixtures"]
pytest.register_assert_rewrite("pgclone.testing.storage")
