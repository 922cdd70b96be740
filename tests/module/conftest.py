"""Services that tests of modules may need."""

from tests.servers.services import service

service("starlette", "starlette", "pip install -e '.[test]'")
service("fastapi", "fastapi", "pip install fastapi")
