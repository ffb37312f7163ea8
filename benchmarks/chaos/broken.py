"""Deliberately broken builds: a witness that cannot fail is no witness."""

from __future__ import annotations

from dataclasses import replace

from celery_memolock import wire

__all__ = ["MUTANTS", "break_build"]

#: name: (script, what stands there, what the broken build has instead)
MUTANTS = {
    # an invalidation that keeps the lock: the run goes on as if its data were current
    "keep-lock": ("invalidate", "redis.call('RENAME', FLIGHT, of_fence('d', flight[1]))", "local kept = true"),
    # a settle without a fence check: whoever comes last wins
    "no-fence": ("settle", "if flight[1] ~= fence or flight[2] ~= attempt then", "if not flight[1] then"),
    # a claim without a check: each copy of a message runs
    "no-claim": ("claim", "return {'SKIP', 'a duplicate: it runs already'}", "return {'RUN', fence, attempt}"),
    # a detached outcome is stored
    "store-detached": ("settle", "if home == FLIGHT then", "if true then"),
}


def break_build(name: str) -> None:
    """Put a mutant's script in the place of the true one, in this process; "" leaves all as it is."""
    if not name:
        return
    script, there, instead = MUTANTS[name]
    true = wire.load(script)
    assert there in true.text, f"mutant {name} no longer fits {script}.lua"
    text = true.text.replace(there, instead)
    broken = replace(true, text=text, sha=wire.digest(text))
    load = wire.load
    wire.load = lambda wanted: broken if wanted == script else load(wanted)
