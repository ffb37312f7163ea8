"""Deliberately broken builds: a witness that cannot fail is no witness."""

from __future__ import annotations

from dataclasses import replace

from celery_memolock import tracker, wire

__all__ = ["MUTANTS", "NAMES", "OF_FRESHNESS", "break_build"]

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

#: What a storm does not come upon, as its callers neither force nor expire, nor ask for a tag or for what is not to be
#: stored: the state machine finds them.
OF_FRESHNESS = {
    # a stale value counts as fresh
    "stale-is-fresh": ("acquire", "stored ~= seen and now < fresh_until", "stored ~= seen"),
    # a forced call is content with any value
    "force-any": ("acquire", "good = stored and started >= since", "good = stored"),
    # a forced call joins a run that began before it, and asks for no other
    "force-joins": ("acquire", "if mode == 'force' and began then", "if false then"),
    # expiring a value leaves it as it was
    "expire-nothing": ("expire", "'S ' .. fence .. ' ' .. started .. ' ' .. int(now)", "'S ' .. fence"),
    # the index of a tag does not name the entry
    "index-nothing": ("index", "redis.call('ZADD', index, 'GT', int(now + life_ms * 1000), ARGV[1])", "local none"),
    # the index of a tag is gone before what it names
    "index-forgets": ("index", "if redis.call('PTTL', index) < life_ms then", "if true then life_ms = 1"),
    # a value that is not stored leaves the one that it replaces
    "unstored-keeps": ("settle", "if store_as == ENTRY and keep_ms == 0 then", "if false then"),
}

#: All broken builds of a storm: beside those of scripts one whose local caches overhear what changed elsewhere.
NAMES = [*MUTANTS, "no-tracking"]


def break_build(name: str) -> None:
    """Put a mutant in the place of the true code, in this process; "" leaves all as it is."""
    if not name:
        return
    if name == "no-tracking":
        assert hasattr(tracker.Tracker, "_drop"), "the mutant no longer fits the tracker"
        tracker.Tracker._drop = lambda *_: None  # type: ignore[method-assign]
        return
    script, there, instead = {**MUTANTS, **OF_FRESHNESS}[name]
    true = wire.load(script)
    assert there in true.text, f"mutant {name} no longer fits {script}.lua"
    text = true.text.replace(there, instead)
    broken = replace(true, text=text, sha=wire.digest(text))
    load = wire.load
    wire.load = lambda wanted: broken if wanted == script else load(wanted)
