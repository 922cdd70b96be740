"""PHP for tests, with what its worker needs."""

from __future__ import annotations

import shutil
import subprocess
from functools import cache

from tests.servers.services import service

REMEDY = "apt install php-cli php-curl php-pgsql php-sqlite3 php-async-aws-sqs"
CHECK = """
foreach (['pcntl', 'posix', 'json', 'curl', 'pdo_pgsql', 'pdo_sqlite'] as $name) extension_loaded($name) || exit(1);
exit(PHP_VERSION_ID >= 80100 && stream_resolve_include_path('AsyncAws/Sqs/autoload.php') ? 0 : 1);
"""


@cache
def at_hand() -> bool:
    """PHP 8.1 or later, its extensions, and the client for SQS."""
    php = shutil.which("php")
    return php is not None and subprocess.run([php, "-r", CHECK], check=False).returncode == 0


service("php", at_hand, REMEDY)
