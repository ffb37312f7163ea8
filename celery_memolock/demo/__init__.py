"""The story this project comes from: a queue page under load, without a cache, with a plain one, and with memolock."""
