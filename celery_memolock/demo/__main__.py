"""``python -m celery_memolock.demo``."""

from .command import command

command()
