/*
 * The protocol of one key, for Spin: callers, workers, invalidations, and the faults between them.
 *
 * Each Lua script is one atomic step and bears the script's name. Time is not modelled: whatever the clock may do
 * (a lease passes, a time-out strikes, a message is late) may happen whenever it is possible at all. docs/model.md
 * says what each step stands for, what is left out, and how the switches below make configurations and mutants.
 *
 * Two kinds of search, each exhaustive within its bounds:
 *   safety   S1-S5 and C1-C5 by assertions. The lease of an unclaimed flight may pass at any time. (S6, at most one
 *            flight that is not detached, holds by construction: there is one variable for it, as there is one key.)
 *   -DLIVE   L1, L2: every behaviour ends, and at its end nobody waits. A lease passes only where nobody is left to
 *            do the flight's work, so each loss costs one of the budgets; a cycle or a waiter at the end is an error.
 */

/* ---- bounds ---- */
#ifndef CALLERS
#define CALLERS 2           /* waiting processes */
#endif
#ifndef CALLS
#define CALLS 1             /* calls that each makes, one after the other */
#endif
#ifndef WORKERS
#define WORKERS 2
#endif
#ifndef FLIGHTS
#define FLIGHTS 3           /* fences that may be made */
#endif
#ifndef INVALIDATIONS
#define INVALIDATIONS 1
#endif
#ifndef CRASHES
#define CRASHES 0           /* workers, or winners before their flight is confirmed, that die */
#endif
#ifndef MAX_CRASHES
#define MAX_CRASHES 2       /* the option max_crashes */
#endif
#ifndef FREEZES
#define FREEZES 0           /* runs whose lease passes though they are alive */
#endif
#ifndef DUPLICATES
#define DUPLICATES 0        /* messages that the broker delivers once more */
#endif
#ifndef RETRIES
#define RETRIES 0           /* of one message */
#endif
#ifndef LOST_MESSAGES
#define LOST_MESSAGES 0     /* LIVE only: elsewhere a message may simply never be received */
#endif
#ifndef LOST_NOTICES
#define LOST_NOTICES 0      /* LIVE only: elsewhere a notice may simply never be heard */
#endif
#ifndef EXPIRIES
#define EXPIRIES 0          /* stored values or flights that reach the end of their key's TTL */
#endif
#ifndef PUTS
#define PUTS 0              /* values set from outside */
#endif
#ifndef REFRESHES
#define REFRESHES 0         /* calls of refresh(): acquire with mode "force" */
#endif
#ifndef FORCES
#define FORCES 0            /* waiting calls with force_refresh: acquire with mode "force", again and again */
#endif
#ifndef EXPIRE_CALLS
#define EXPIRE_CALLS 0      /* calls of expire(), the gentle invalidation */
#endif
#ifndef TIMEOUTS
#define TIMEOUTS 0          /* callers that give up before they have an outcome */
#endif
#ifndef DISOWNED
#define DISOWNED 0          /* of the crashes: killed at the hard time limit, of which the main process tells */
#endif
#ifndef WITHDRAWALS
#define WITHDRAWALS 0       /* callers that end while their acquire travels */
#endif
#ifndef OVERLAP
#define OVERLAP 9           /* the option max_overlap */
#endif
/* Further switches: ERRORS (runs may fail, dispatch may fail), ERROR_RECORD (error_ttl > 0), FLEETING (outcomes are
 * parked beside the stored value), ABANDON (skip_abandoned), GOES_ON (a run may go on after its retry: throw=False),
 * STORE_DOWN (a retry may be published though its requeue failed), STALE (a value's ttl may pass before it is gone: it
 * is served while it is refreshed, or spared for an error), EARLY (a fresh one may be refreshed too), TAGS (all
 * invalidations are of a tag, whose index names the entry only once somebody has written it). */

/* Each switch M_... breaks one rule; the tables of docs/model.md and test_model.py name them all. */

#define PENDING 1
#define QUEUED  2
#define RUNNING 3

/* An outcome is 0 for none, else the version of the data it was computed from plus one; an error has ERROR added. */
#define ERROR 64
#define VERSION_OF(outcome) (((outcome) & 63) - 1)

#define BIT(n) (1 << (n))
#define TRIES (RETRIES + 1)

/* Somebody may ask for a run that starts later than now. */
#define PROMISES (REFRESHES + FORCES + EXPIRE_CALLS)

/* ---- the source of data, and the ghost of what has been acknowledged ---- */
byte version, acknowledged;

/* ---- the server ---- */
byte entry, entry_fence;                                /* memolock:1:e */
byte failure, failure_fence;                            /* memolock:1:x, the error record */
byte fence, state, attempt, retries, crashes, waiters;  /* memolock:1:f, the current flight; fence 0: absent */
bit again, background;
#if PROMISES
byte aside_again;                                       /* the flights that were moved aside with `again` */
#endif
byte aside[FLIGHTS + 1], aside_waiters[FLIGHTS + 1];    /* memolock:1:d:<fence>: the attempt of a detached run */
byte parked[FLIGHTS + 1];                               /* memolock:1:p:<fence> */
byte fences;                                            /* made so far */
#if defined(STALE) || EXPIRE_CALLS
bit stale;                                              /* the entry's fresh_until has passed */
#endif
#ifdef TAGS
bit indexed;                                            /* the tag's index names the entry */
bit putting;                                            /* ghost: a value is about to be set */
#endif

/* `started` of a flight or an outcome counts only against the `since` of calls that force: for which of them it is
 * late enough. */
#if FORCES
byte since;                                             /* the callers that have one */
byte started, entry_started, parked_started[FLIGHTS + 1], aside_started[FLIGHTS + 1];
byte mail_started;                                      /* of what lies in each caller's mail */
byte run_started[WORKERS];                              /* ghost: of the run itself, whatever the flight says */
#endif

/* ---- the broker: how many messages there are of each kind, in no order. Once its flight is not the current one any
 * more, all that claim.lua can tell of a message's fence is that it is older. ---- */
byte fresh[TRIES], redone[TRIES];   /* with the current fence, by retries: first deliveries, redeliveries */
byte old[TRIES];                    /* with an older fence */

/* ---- callers ---- */
byte follows[CALLERS], known[CALLERS], mail[CALLERS];
#ifdef M_NOTICE_OF_ANY_FLIGHT
byte mail_fence[CALLERS];
#endif
bit bell[CALLERS], begun[CALLERS];

/* ---- workers: the run of each, fence 0: idle ---- */
byte run_fence[WORKERS], run_attempt[WORKERS], run_version[WORKERS];
bit late[WORKERS];      /* its lease may have passed */
bit busy[WORKERS];
bit gave_up[WORKERS];   /* ghost: it asked for a retry, so another attempt may run beside it */

/* ---- ghosts ---- */
byte last_run;          /* the highest attempt of the current fence that ever ran */
bit asked_newer;        /* a refresh was promised a run that starts after it */
bit starts_newer[WORKERS];
byte senders, sent;     /* LIVE: who is about to send a message, and how many are on their way */
byte dying = CRASHES, freezing = FREEZES, doubling = DUPLICATES;
byte losing = LOST_MESSAGES, deaf = LOST_NOTICES, expiring = EXPIRIES, leaving = TIMEOUTS, killing = DISOWNED;
#if FORCES
byte forcing = FORCES;
#endif
byte killed_fence, killed_attempt;  /* the run that a main process is about to tell of */

/* Scratch of one atomic step, no part of the state. */
hidden byte i, told, got, got_fence, got_started, m_retries;
hidden byte go, m_redelivered;

/* An assertion that names its property: the name is a variable that is never set. Beside those of the protocol:
 *   C1  a flight is taken over only when its lease may have passed
 *   C2  a claim never makes more live runs than max_overlap
 *   C3  after a refresh, a run that began before it is never the last word
 *   C4  no attempt runs with fewer retries than its flight has had: a retry's count and countdown hold
 *   C5  a call that forces gets no outcome whose computing began before it */
hidden byte S1, S2, S3, S4, S5, L1, C1, C2, C3, C4, C5;
#define MUST(property, condition) assert((condition) || property)

#define DONE 1
#define WAIT 2
#define WIN  3
#define OUT  4      /* no more fences: the bound of this model */
#define DEFER 5
#define RUN  6
#define SKIP 7
#define DROP 8

#if WORKERS == 1
#define ANY_WORKER(P) (P(0))
#define COUNT_WORKERS(P) (P(0))
#elif WORKERS == 2
#define ANY_WORKER(P) (P(0) || P(1))
#define COUNT_WORKERS(P) (P(0) + P(1))
#else
#define ANY_WORKER(P) (P(0) || P(1) || P(2))
#define COUNT_WORKERS(P) (P(0) + P(1) + P(2))
#endif

/* ---- time: which leases may have passed ---- */
#define RUNS_IT(w) (run_fence[w] == fence && run_attempt[w] == attempt && !late[w])
#ifdef LIVE
#define UNCLAIMED_MAY_PASS (senders == 0 && sent == 0)
#else
#define UNCLAIMED_MAY_PASS true
#endif
#ifdef M_NEVER_EXPIRES
#define MAY_PASS (fence && state != RUNNING && UNCLAIMED_MAY_PASS)
#else
#define MAY_PASS (fence && (state == RUNNING -> !ANY_WORKER(RUNS_IT) : UNCLAIMED_MAY_PASS))
#endif
#define IS_BUSY(w) busy[w]
#define RUNS_ASIDE(w, f) (run_fence[w] == f && run_attempt[w] == aside[f] && !late[w])
#if WORKERS == 1
#define ASIDE_MAY_PASS(f) (aside[f] && !RUNS_ASIDE(0, f))
#elif WORKERS == 2
#define ASIDE_MAY_PASS(f) (aside[f] && !RUNS_ASIDE(0, f) && !RUNS_ASIDE(1, f))
#else
#define ASIDE_MAY_PASS(f) (aside[f] && !RUNS_ASIDE(0, f) && !RUNS_ASIDE(1, f) && !RUNS_ASIDE(2, f))
#endif

/* ---- what only some configurations know of ---- */
#define NOBODY CALLERS      /* who looks without waiting: acquire with no inbox */
#if FORCES
#define SET_STARTED(place, callers) place = callers
#define LATE_ENOUGH(place, me) ((place) & BIT(me))
#define HAS_SINCE(me) (since & BIT(me))
#define ASIDE_STARTED(whose) aside_started[whose]
#else
#define SET_STARTED(place, callers) skip
#define LATE_ENOUGH(place, me) false
#define HAS_SINCE(me) false
#define forces false
#define since 0
#define started 0
#define mail_started 0
#define ASIDE_STARTED(whose) 0
#endif
#if defined(STALE) || EXPIRE_CALLS
#define IS_STALE stale
#define SET_STALE(whether) stale = whether
#else
#define IS_STALE false
#define SET_STALE(whether) skip
#endif
#ifdef EARLY
#define IS_SERVED (entry != 0)
#else
#define IS_SERVED (entry && IS_STALE)
#endif
#ifndef STALE
#define seen 0
#endif
#define GOOD(force, unwanted, me) (entry && (force -> LATE_ENOUGH(entry_started, me) \
    : (!IS_STALE && entry_fence != unwanted)))
/* It runs, or ran and may still do so beside its own retry, and that is too early for a call that forces. */
#ifdef M_REFRESH_JOINS_OLD_RUN
#define BEGAN(me) (state == RUNNING && !LATE_ENOUGH(started, me))
#else
#define BEGAN(me) (attempt != 0 && (state != RUNNING || !LATE_ENOUGH(started, me)))
#endif

/* ---- _common.lua ---- */

/* PUBLISH to every registered caller that waits in the room of that flight. outcome 0: "look again". */
#ifdef M_NOTICE_OF_ANY_FLIGHT
#define HEARS(caller, whose) follows[caller]
#define SET_MAIL_FENCE(caller, whose) mail_fence[caller] = whose
#define MAIL_FENCE(caller) mail_fence[caller]
#else
#define HEARS(caller, whose) (follows[caller] == whose)
#define SET_MAIL_FENCE(caller, whose) skip
#define MAIL_FENCE(caller) follows[caller]
#endif
inline ring(whose, registered, outcome, began) {
    i = 0;
    do
    :: i < CALLERS && (registered & BIT(i)) && HEARS(i, whose) ->
        if
#ifdef LIVE
        :: deaf -> deaf--
#endif
        :: outcome ->
            mail[i] = outcome; SET_MAIL_FENCE(i, whose);
            SET_STARTED(mail_started, (mail_started & ~BIT(i)) | (began & BIT(i)))
#ifdef M_NO_POLL
        :: true -> bell[i] = 1      /* a notice without the outcome */
#else
        :: !outcome -> skip         /* "look again" adds nothing to a poll that may come at any time */
#endif
        fi;
        i++
    :: i < CALLERS && !((registered & BIT(i)) && HEARS(i, whose)) -> i++
    :: i == CALLERS -> break
    od
}

/* Only those who follow a flight ever read what was parked for it. */
inline park(whose, outcome, began) {
    i = 0;
    do
    :: i < CALLERS && follows[i] == whose ->
        parked[whose] = outcome; SET_STARTED(parked_started[whose], began);
        break
    :: i < CALLERS && follows[i] != whose -> i++
    :: i == CALLERS -> break
    od
}

/* The current flight's messages are those of an older one now. */
inline age_messages() {
    old[0] = old[0] + fresh[0] + redone[0]; fresh[0] = 0; redone[0] = 0;
#if RETRIES > 0
    old[1] = old[1] + fresh[1] + redone[1]; fresh[1] = 0; redone[1] = 0;
#endif
#if RETRIES > 1
    old[2] = old[2] + fresh[2] + redone[2]; fresh[2] = 0; redone[2] = 0;
#endif
    last_run = 0
}

inline clear_flight() {
    age_messages();
    fence = 0; state = 0; attempt = 0; retries = 0; crashes = 0; waiters = 0; again = 0; background = 0;
    SET_STARTED(started, 0);
    asked_newer = 0
}

inline store(outcome, outcome_fence, began) {
    MUST(S1, VERSION_OF(outcome) >= acknowledged);
    if
    :: outcome & ERROR ->
#ifdef ERROR_RECORD
        failure = outcome; failure_fence = outcome_fence
#else
        skip
#endif
    :: else -> entry = outcome; entry_fence = outcome_fence; SET_STALE(0); SET_STARTED(entry_started, began)
    fi
}

inline drop_entry() {
    entry = 0; entry_fence = 0; SET_STALE(0); SET_STARTED(entry_started, 0)
}

inline give(whose, registered, outcome, outcome_fence, stored, began) {
    if
    :: stored -> store(outcome, outcome_fence, began)
    :: else
    fi;
    if
#ifndef FLEETING
    :: stored && !(outcome & ERROR) -> skip
    :: else ->
#else
    :: true ->
#endif
        park(whose, outcome, began)
    fi;
    ring(whose, registered, outcome, began)
}

inline conclude(outcome, outcome_fence, stored, began) {
    give(fence, waiters, outcome, outcome_fence, stored, began);
    clear_flight()
}

inline clear_aside(whose) {
#if PROMISES
    aside_again = aside_again & ~BIT(whose);
#endif
    aside[whose] = 0; aside_waiters[whose] = 0; SET_STARTED(aside_started[whose], 0)
}

inline new_fence() {
    age_messages();
    fences++;
    fence = fences; state = PENDING; attempt = 0; retries = 0; SET_STARTED(started, 0)
}

/* Ghost: a run that begins before now is not to be the last word. */
inline promise() {
#if PROMISES
    asked_newer = 1;
    i = 0;
    do
    :: i < WORKERS -> starts_newer[i] = 0; i++
    :: else -> break
    od
#else
    skip
#endif
}

inline join(me) {
    if
    :: me == NOBODY -> background = 1
    :: else -> waiters = waiters | BIT(me)
    fi
}

/* ---- acquire.lua. Leaves its answer in `told`, `got`, `got_fence` and `got_started`. ---- */
inline acquire(force, unwanted, following, me) {
    told = 0;
    if
    :: following && parked[following] ->
        told = DONE; got = parked[following]; got_fence = following;
        SET_STARTED(got_started, parked_started[following])
    :: else ->
        if
        :: following && aside[following] && !ASIDE_MAY_PASS(following) -> told = WAIT; got_fence = following
#ifdef M_FOLLOW_DETACHED
        :: !following && !force && !fence && aside[fences] ->
            told = WAIT; got_fence = fences; aside_waiters[fences] = aside_waiters[fences] | BIT(me)
#endif
        :: else
        fi
    fi;
    if
#ifdef M_FORCE_TAKES_STORED
    :: told == 0 && force && entry && !following ->
        told = DONE; got = entry; got_fence = entry_fence; SET_STARTED(got_started, entry_started)
#endif
    :: told == 0 && GOOD(force, unwanted, me) ->
        told = DONE; got = entry; got_fence = entry_fence; SET_STARTED(got_started, entry_started)
    :: told == 0 && !force && !GOOD(force, unwanted, me) && failure ->
        told = DONE; got = failure; got_fence = failure_fence
    :: else
    fi;
    if
    :: told -> skip
    :: else ->
        /* To look and hear of the lease that one waits for already changes nothing but `again`; else it is left out. */
        if
        :: fence && !(MAY_PASS && following == fence && !(force && BEGAN(me) && !again)) ->
            told = WAIT; got_fence = fence;
            again = (again || (force && BEGAN(me)));
            join(me)
#ifdef M_TAKE_LIVE
        :: fence ->
#else
        :: MAY_PASS ->
#endif
            MUST(C1, MAY_PASS);
            if
            :: state == RUNNING && crashes + 1 >= MAX_CRASHES ->
                told = DONE; got = ERROR + version + 1; got_fence = fence; SET_STARTED(got_started, started);
                conclude(got, got_fence, !again, got_started)
            :: !(state == RUNNING && crashes + 1 >= MAX_CRASHES) && fences == FLIGHTS -> told = OUT
            :: else ->
                crashes = crashes + (state == RUNNING);
                ring(fence, waiters, 0, 0);
                told = WIN
            fi
        :: !fence && fences == FLIGHTS -> told = OUT
        :: !fence && fences < FLIGHTS -> told = WIN
        fi;
        if
        :: told == WIN ->
            new_fence();
            got_fence = fence; failure = 0; failure_fence = 0;
            join(me);
            senders++
        :: else
        fi
    fi
}

/* acquire for refresh(), or for the run that is to follow one. */
inline ask_for_newer() {
    acquire(1, 0, 0, NOBODY);
    if
    :: told != OUT -> promise()
    :: else
    fi
}

/* ---- settle.lua ---- */
inline settle(whose, its_attempt, outcome) {
    if
#if defined(M_SETTLE_UNCHECKED)
    :: fence ->
#elif defined(M_SETTLE_ANY_ATTEMPT)
    :: fence == whose ->
#else
    :: fence == whose && attempt == its_attempt ->
#endif
        MUST(S4, fence == whose && attempt == its_attempt);
        SET_STARTED(got_started, (its_attempt -> started : since));
        conclude(outcome, whose, 1, got_started)
    :: else ->
        if
#ifdef M_SETTLE_UNCHECKED
        :: !aside[whose] -> MUST(S4, false)
#endif
        :: its_attempt && aside[whose] == its_attempt ->
#ifdef M_STORE_DETACHED
            give(whose, aside_waiters[whose], outcome, whose, 1, ASIDE_STARTED(whose));
#else
            give(whose, aside_waiters[whose], outcome, whose, 0, ASIDE_STARTED(whose));
#endif
            clear_aside(whose)
        :: else
        fi
    fi
}

/* ---- confirm.lua ---- */
inline confirm(whose) {
    if
#ifdef M_CONFIRM_CLAIMED
    :: fence == whose ->
#else
    :: fence == whose && state == PENDING ->
#endif
        state = QUEUED
    :: else
    fi
}

/* ---- invalidate.lua ---- */
inline invalidate() {
#if defined(M_INVALIDATE_KEEPS_STALE)
    if
    :: !IS_STALE -> drop_entry()
    :: else
    fi;
#elif !defined(M_INVALIDATE_KEEPS_VALUE)
    drop_entry();
#endif
#ifndef M_KEEP_ERROR
    failure = 0; failure_fence = 0;
#endif
    if
#ifndef M_KEEP_LOCK
    :: state == RUNNING ->
        aside[fence] = attempt; aside_waiters[fence] = waiters; SET_STARTED(aside_started[fence], started);
#if PROMISES
        aside_again = aside_again | (again << fence);
#endif
        clear_flight()
#endif
#ifndef M_RETRY_KEEPS_ATTEMPT
    :: state == QUEUED && attempt -> attempt++
#endif
    :: else
    fi
}

/* ---- withdraw.lua, for whom acquire made the flight, or who claimed its first run in the same step ---- */
inline withdraw(whose, claimed) {
    if
#ifdef M_WITHDRAW_CLAIMED
    :: fence == whose ->
#else
    :: fence == whose && (claimed -> state == RUNNING && attempt == 1 : state == PENDING) ->
#endif
        state = QUEUED;
        ring(whose, waiters, 0, 0)
    :: else
    fi
}

/* ---- expire.lua, of a value that is kept on as a stale one ---- */
inline expire() {
#ifdef M_EXPIRE_FORGETS_RUN
    skip;
#elif defined(M_EXPIRE_FORGETS_RETRY)
    again = (again || state == RUNNING);
#else
    again = (again || attempt != 0);
#endif
    SET_STALE((entry != 0));
    if
    :: fence -> promise()
    :: else
    fi
}

/* ---- messages ---- */
inline send(whose, its_retries, redelivered) {
    if
    :: whose && whose == fence && redelivered -> redone[its_retries]++
    :: whose && whose == fence && !redelivered -> fresh[its_retries]++
    :: else -> old[its_retries]++
    fi;
    sent++
}

/* ================================================ a caller ================================================ */

/* A look changes something: there is an outcome, another flight, a lease that has passed, or another run to ask for. */
#define WORTH(f) (parked[f] || (aside[f] -> ASIDE_MAY_PASS(f) : (GOOD(forces, seen, me) || (failure && !forces) \
    || fence != f || MAY_PASS || (forces && BEGAN(me) && !again))))

/* It began before the call, which then meets the next flight in the lobby. */
#define REFUSES(me, began) (HAS_SINCE(me) && !LATE_ENOUGH(began, me))

inline unfollow(me) {
    got = follows[me];
    follows[me] = 0; mail[me] = 0; bell[me] = 0;
    i = 0;
    do
    :: i < CALLERS && follows[i] == got -> break
    :: i < CALLERS && follows[i] != got -> i++
    :: i == CALLERS -> parked[got] = 0; SET_STARTED(parked_started[got], 0); break
    od
}

/* The call is over. */
inline end_call(me) {
    unfollow(me);
    known[me] = 0;
#ifdef STALE
    seen = 0; spare = 0; failed = 0;
#endif
#if FORCES
    forces = 0;
    since = since & ~BIT(me); started = started & ~BIT(me); entry_started = entry_started & ~BIT(me);
    mail_started = mail_started & ~BIT(me);
    i = 0;
    do
    :: i <= FLIGHTS ->
        parked_started[i] = parked_started[i] & ~BIT(me); aside_started[i] = aside_started[i] & ~BIT(me);
        i++
    :: else -> break
    od;
    i = 0;
    do
    :: i < WORKERS -> run_started[i] = run_started[i] & ~BIT(me); i++
    :: else -> break
    od
#else
    skip
#endif
}

/* It gets no value. With a stale one to spare it takes a last look; data that were invalid before are too old then. */
inline fail(me) {
#ifdef STALE
    if
    :: spare -> unfollow(me); failed = 1; known[me] = acknowledged
    :: else -> end_call(me)
    fi
#else
    end_call(me)
#endif
}

inline finish(me, outcome, outcome_fence, began) {
    MUST(S2, VERSION_OF(outcome) >= known[me]);
    MUST(S5, outcome_fence >= follows[me]);
    /* Too many crashes are told to a first look too: an error, and no outcome of a run. */
    MUST(C5, !forces || LATE_ENOUGH(began, me) || ((outcome & ERROR) && !HAS_SINCE(me)));
    if
    :: outcome & ERROR -> fail(me)
    :: else -> end_call(me)
    fi
}

/* The look of a call that forces sees an old outcome only if that was parked, or if it was the last of too many
 * crashes; it then leaves the room, and looks as a newcomer does. */
inline look(me) {
    do
    :: acquire(forces, seen, follows[me], me);
        if
#ifndef M_FORCE_TAKES_OLD_RUN
        :: told == DONE && REFUSES(me, got_started) -> unfollow(me)
        :: told != DONE || !REFUSES(me, got_started) -> break
#else
        :: true -> break
#endif
        fi
    od;
    if
    :: told == DONE -> finish(me, got, got_fence, got_started)
    :: told == OUT ->
#ifdef LIVE
        MUST(L1, false);    /* more flights than faults: they are made and dropped for ever */
#endif
        end_call(me)
    :: else ->
#if FORCES
        if
        :: forces && !HAS_SINCE(me) -> since = since | BIT(me); promise()
        :: else
        fi;
#endif
        if
        :: follows[me] && follows[me] != got_fence -> unfollow(me)
        :: else
        fi;
        follows[me] = got_fence; bell[me] = 0;
        if
        :: told == WIN -> won = got_fence
        :: else
        fi
    fi
}

/* ---- leave.lua ---- */
inline leave(me) {
    waiters = waiters & ~BIT(me);
    aside_waiters[follows[me]] = aside_waiters[follows[me]] & ~BIT(me);
    fail(me)
}

/* Callers are alike, so they begin in order. */
#define IN_TURN(me) (me == 0 || begun[me - 1])

proctype caller(byte me) {
    byte calls = CALLS;
    byte won;           /* the flight that it has to dispatch */
    bit sent_it;
#if FORCES
    bit forces;         /* mode "force" */
#endif
#ifdef STALE
    byte seen;          /* the fence of a value that is not fresh enough */
    byte spare;         /* that value, if the call waits for a better one; else it has been served */
    bit failed;         /* there is none */
#endif
#ifdef M_STALE_COPY
    byte copy;
#endif

    do
    /* A call: GET, then the first look. Nobody else sees what lies between, and to begin late is the harder case. */
    :: atomic { calls && !follows[me] && !won && !seen && IN_TURN(me) ->
        calls--; begun[me] = 1; known[me] = acknowledged;
#if FORCES
        if
        :: forcing -> forcing--; forces = 1
        :: true
        fi;
#endif
#ifdef STALE
        if
#ifdef M_STALE_COPY
        :: !entry && copy -> finish(me, copy, 0, 0)
#endif
        /* It is served, and a refresh asked for beside the call. */
        :: IS_SERVED && !forces ->
#ifdef M_STALE_COPY
            copy = entry;
#endif
            finish(me, entry, entry_fence, 0);
            seen = entry_fence
        /* Only an error, or no answer in time, will have it served. */
        :: entry && stale && !forces -> seen = entry_fence; spare = entry
        :: !(entry && stale) || forces -> look(me)
        fi }
    :: atomic { seen && !spare ->
        acquire(0, seen, 0, NOBODY);
        seen = 0;
        if
        :: told == WIN -> won = got_fence
#ifdef LIVE
        :: told == OUT -> MUST(L1, false)
#endif
        :: else
        fi }
    :: atomic { spare && !follows[me] && !failed -> look(me) }
    /* The last look: whatever is stored now. */
    :: atomic { failed ->
#ifdef M_SPARE_UNCHECKED
        finish(me, spare, seen, 0)
#else
        if
        :: entry -> finish(me, entry, entry_fence, 0)
        :: else -> end_call(me)
        fi
#endif
        }
#else
        look(me) }
#endif
#ifdef M_NO_POLL
    :: atomic { follows[me] && !won && bell[me] -> look(me) }
#else
    :: atomic { follows[me] && !won && WORTH(follows[me]) -> look(me) }
#endif
    :: atomic { follows[me] && !won && mail[me] ->
        if
#ifndef M_FORCE_TAKES_OLD_RUN
        :: REFUSES(me, mail_started) -> unfollow(me); look(me)
        :: !REFUSES(me, mail_started) ->
#else
        :: true ->
#endif
            finish(me, mail[me], MAIL_FENCE(me), mail_started)
        fi }
    :: atomic { won && !sent_it -> send(won, 0, 0); senders--; sent_it = 1 }
    :: atomic { won && sent_it -> confirm(won); won = 0; sent_it = 0 }
#ifdef ERRORS
    /* The broker did not take it, or not in time. */
    :: atomic { won && !sent_it ->
        if
        :: send(won, 0, 0)
        :: skip
        fi;
        settle(won, 0, ERROR + version + 1);
        senders--; won = 0;
        fail(me) }
#endif
#if CRASHES
    :: atomic { won && dying ->
        dying--; senders = senders - !sent_it; won = 0; sent_it = 0; calls = 0; end_call(me) }
#endif
    :: atomic { leaving && follows[me] && !won -> leaving--; leave(me) }
    :: atomic { !calls && !follows[me] && !won && !seen -> break }
    od
}

/* ================================================ a worker ================================================ */

#define OVERLAPS(w) (run_fence[w] && !late[w] && !gave_up[w] && (aside[run_fence[w]] == run_attempt[w] || RUNS_IT(w)))

#define FULL (COUNT_WORKERS(OVERLAPS) >= OVERLAP)

inline idle(me) {
    run_fence[me] = 0; run_attempt[me] = 0; run_version[me] = 0; late[me] = 0; gave_up[me] = 0;
    starts_newer[me] = 0; busy[me] = 0; m_old = 0; m_tries = 0; SET_STARTED(run_started[me], 0)
}

/* S3, seen from the run that begins: the other one was superseded, detached, late or asked for a retry. */
#define GIVES_WAY(w) (run_fence[w] != fence || run_attempt[w] != attempt || late[w] || gave_up[w])

/* To defer a retry again and again is no progress, so in LIVE it comes again when it may run; see MY_TURN. */
#ifdef LIVE
#define NO_USE (its_retries > retries)
#else
#define NO_USE false
#endif

/* ---- claim.lua. Leaves its answer in `told`. ---- */
inline claim(me, whose, its_retries, redelivered) {
    told = 0;
    if
#ifdef M_CLAIM_UNCHECKED
    :: fence -> skip
#else
    :: fence && fence != whose ->
        if
#ifndef M_ADOPT_RUNNING
        :: state == RUNNING -> told = SKIP
#endif
#ifndef M_ADOPT_BEFORE_RETRY
        :: its_retries < retries -> told = SKIP
#endif
        :: else
        fi
    :: fence && fence == whose && its_retries < retries -> told = SKIP
    :: fence && fence == whose && state == RUNNING && its_retries >= retries ->
        if
#ifndef M_RETRY_OVERTAKES
        :: (redelivered || its_retries > retries) && !(NO_USE && MAY_PASS) -> told = DEFER
#else
        :: redelivered && its_retries == retries -> told = DEFER
        :: its_retries > retries -> skip
#endif
        :: !redelivered && its_retries == retries -> told = SKIP
        :: MAY_PASS && its_retries > retries -> skip
        :: MAY_PASS && its_retries == retries ->
            crashes++;
            if
            :: crashes >= MAX_CRASHES ->
                told = DROP; got = ERROR + version + 1; got_fence = fence;
                conclude(got, got_fence, !again, started)
            :: else
            fi
        fi
#endif
    :: !fence -> told = SKIP
    :: else
    fi;
#ifdef ABANDON
    if
#ifdef M_ABANDON_WAITED
    :: !told && !background -> told = DROP; clear_flight()
#else
    :: !told && !background && !waiters -> told = DROP; clear_flight()
#endif
    :: else
    fi;
#endif
    if
#ifndef M_OVERLAP_UNCHECKED
    :: !told && FULL -> told = DEFER; state = QUEUED
    :: !told && !FULL -> told = RUN
#else
    :: !told -> told = RUN
#endif
#if OVERLAP < 9 && CRASHES
    :: !told && dying < CRASHES && !(state == QUEUED && !redelivered) -> told = DEFER; state = QUEUED
#endif
    :: else
    fi;
    if
    :: told == RUN ->
        MUST(C2, !FULL);
        MUST(C4, its_retries >= retries);
        i = 0;
        do
        :: i < WORKERS && run_fence[i] -> MUST(S3, GIVES_WAY(i)); i++
        :: i < WORKERS && !run_fence[i] -> i++
        :: i == WORKERS -> break
        od;
#ifndef M_CLAIM_UNCHECKED
        attempt++;
#else
        attempt = (attempt -> attempt : 1);
#endif
        MUST(S3, attempt > last_run);
        last_run = attempt;
        state = RUNNING; retries = its_retries; again = 0;
        run_fence[me] = fence; run_attempt[me] = attempt; run_version[me] = version;
        SET_STARTED(started, since); SET_STARTED(run_started[me], since);
#if PROMISES
        starts_newer[me] = 1;
#endif
        m_old = (whose != fence)
    :: else
    fi
}

#define VALUE(me) (run_version[me] + 1)

inline end_run(me, outcome) {
#if defined(TAGS) && defined(M_INDEX_AFTER_RUN)
    indexed = 1;
#endif
#if FORCES
    MUST(C5, fence != run_fence[me] || attempt != run_attempt[me] || started == run_started[me]);
    MUST(C5, aside[run_fence[me]] != run_attempt[me] || aside_started[run_fence[me]] == run_started[me]);
#endif
#if PROMISES
    go = (fence == run_fence[me] && attempt == run_attempt[me]);
    if
    :: go ->
        MUST(C3, again || !asked_newer || starts_newer[me]);
        m_again = again
    :: !go && aside[run_fence[me]] == run_attempt[me] ->
        m_again = ((aside_again & BIT(run_fence[me])) && !fence && !entry)
    :: else
    fi;
#endif
    settle(run_fence[me], run_attempt[me], outcome);
    idle(me);
    busy[me] = m_again
}

/* Workers are alike, so the first idle one receives. */
#if defined(LIVE)
/* A deferred message comes again when it may be of use, or it could come for ever. */
#define MY_TURN(me, r) ((me == 0 || busy[me - 1]) && !(FULL && state == QUEUED) \
    && !(state == RUNNING && r > retries && !MAY_PASS))
#else
#define MY_TURN(me, r) (me == 0 || busy[me - 1])
#endif

#define RECEIVE(r) \
    :: MY_TURN(me, r) && fresh[r] -> fresh[r]--; go = fence; m_retries = r; m_redelivered = 0 \
    :: MY_TURN(me, r) && redone[r] -> redone[r]--; go = fence; m_retries = r; m_redelivered = 1 \
    :: MY_TURN(me, r) && old[r] -> old[r]--; go = 0; m_retries = r; m_redelivered = 0

/* ---- requeue.lua. `told` is RUN for "OK". ---- */
inline requeue(me) {
    told = SKIP;
    if
#ifdef M_REQUEUE_UNCHECKED
    :: fence ->
#else
    :: fence == run_fence[me] && attempt == run_attempt[me] ->
#endif
        MUST(S4, fence == run_fence[me] && attempt == run_attempt[me]);
        state = QUEUED; retries = m_tries + 1; told = RUN
    :: else ->
        if
        :: aside[run_fence[me]] == run_attempt[me] ->
            ring(run_fence[me], aside_waiters[run_fence[me]], 0, 0);
            clear_aside(run_fence[me])
        :: else
        fi
    fi
}

/* ---- renew.lua ---- */
#define RENEWS(me) (late[me] && ((fence == run_fence[me] && attempt == run_attempt[me] && state == RUNNING) \
    || aside[run_fence[me]] == run_attempt[me]))

proctype worker(byte me) {
    byte m_tries;           /* retries that the message of its run carries */
    bit m_old;              /* it carries an older fence than the run */
    bit publishing;         /* a retry: between requeue and the message */
    bit m_again;            /* settle answered AGAIN */
    byte m_won;             /* the flight of that refresh */
#ifdef TAGS
    byte m_fence;           /* of a message between the index and the claim */
    bit m_came_again;       /* it was redelivered */
#endif

end_idle:
    atomic {
        if
        RECEIVE(0)
#if RETRIES > 0
        RECEIVE(1)
#endif
#if RETRIES > 1
        RECEIVE(2)
#endif
        fi;
        busy[me] = 1;
#if defined(TAGS) && !defined(M_INDEX_AFTER_CLAIM) && !defined(M_INDEX_AFTER_RUN)
        indexed = 1;
        m_fence = go; m_tries = m_retries; m_came_again = m_redelivered
    }
    /* To die here is what it is to lose the message, or to have it delivered again. */
    atomic {
        go = m_fence; m_retries = m_tries; m_redelivered = m_came_again;
        m_fence = 0; m_tries = 0; m_came_again = 0;
#endif
        sent--;
#ifdef LIVE
        if
        :: true -> claim(me, go, m_retries, m_redelivered)
        :: losing -> losing--; told = DROP
        fi;
#else
        claim(me, go, m_retries, m_redelivered);
#endif
        if
        :: told == DEFER -> send(go, m_retries, 0)
#ifndef LIVE
        /* A message that never arrives again can do all that one can that was dropped, so none is. */
        :: told == SKIP -> send(go, m_retries, m_redelivered)
#endif
        :: else
        fi;
        if
        :: told == RUN || told == DEFER ->
            if
            :: true
            :: doubling -> doubling--; send(go, m_retries, 0)
            :: doubling -> doubling--; send(go, m_retries, 1)
            fi
        :: else
        fi;
        if
        :: told == RUN -> m_tries = m_retries
        :: else -> idle(me); goto end_idle
        fi
    }
#if defined(TAGS) && defined(M_INDEX_AFTER_CLAIM)
    indexed = 1;
#endif
    do
    :: atomic { freezing && !late[me] -> freezing--; late[me] = 1 }
    :: atomic { RENEWS(me) -> late[me] = 0 }
    :: atomic { !publishing -> end_run(me, VALUE(me)); break }
#ifdef ERRORS
    :: atomic { !publishing -> end_run(me, ERROR + VALUE(me)); break }
#endif
#if RETRIES
    :: atomic { !publishing && !gave_up[me] && m_tries < RETRIES ->
        requeue(me);
        if
        :: told == RUN -> publishing = 1; gave_up[me] = 1; senders++
        :: else -> idle(me); break
        fi }
#ifdef STORE_DOWN
    /* The server was away; the message is published all the same. */
    :: atomic { !publishing && !gave_up[me] && m_tries < RETRIES -> publishing = 1; gave_up[me] = 1; senders++ }
#endif
    :: atomic { publishing ->
        send((m_old -> 0 : run_fence[me]), m_tries + 1, 0); senders--; publishing = 0;
        if
        :: idle(me); break
#ifdef GOES_ON
        :: true
#endif
        fi }
#ifdef ERRORS
    :: atomic { publishing -> senders--; publishing = 0; end_run(me, ERROR + version + 1); break }
#endif
#endif
#if CRASHES
    :: atomic { dying ->
        dying--;
        if
        :: publishing -> senders--; publishing = 0
        :: else
        fi;
        if
        :: send((m_old -> 0 : run_fence[me]), m_tries, 1)    /* acknowledged late */
        :: true                         /* acknowledged early: it is gone */
        fi;
        idle(me); break }
#if DISOWNED
    :: atomic { dying && killing && !publishing ->
        dying--; killing--;
        killed_fence = run_fence[me]; killed_attempt = run_attempt[me];
        idle(me); break }
#endif
#endif
    od;
#if PROMISES
    if
    :: atomic { m_again ->
        m_again = 0;
        ask_for_newer();
        if
        :: told == WIN -> m_won = got_fence
        :: else
        fi }
    :: else
    fi;
    if
    :: atomic { m_won -> send(m_won, 0, 0); senders--; confirm(m_won); m_won = 0; busy[me] = 0 }
    :: atomic { !m_won -> busy[me] = 0 }
    fi;
#endif
    goto end_idle
}

/* ============================================== everybody else ============================================== */

proctype invalidator() {
    byte left = INVALIDATIONS;
    do
    :: left ->
        version++;
#ifdef TAGS
        /* Read the tag's index, then invalidate each entry that it names. */
        if
        :: atomic { indexed -> left-- }; atomic { invalidate() }
        :: atomic { !indexed -> left-- }
        fi;
#else
        atomic { left--; invalidate() }
#endif
        atomic { acknowledged = version; MUST(S1, !entry || VERSION_OF(entry) >= acknowledged) }
    :: else -> break
    od
}

/* disown.lua, with an outcome. A process that was killed runs nothing else, so its name as holder names the run. */
proctype main_process() {
end_main:
    do
    :: atomic { killed_fence ->
        if
#ifdef M_DISOWN_ANY_HOLDER
        :: state == RUNNING ->
#else
        :: state == RUNNING && fence == killed_fence && attempt == killed_attempt ->
#endif
            MUST(S4, fence == killed_fence && attempt == killed_attempt);
            conclude(ERROR + version + 1, killed_fence, !again, started)
        :: else ->
            if
            :: aside[killed_fence] == killed_attempt ->
                give(killed_fence, aside_waiters[killed_fence], ERROR + version + 1, killed_fence, 0,
                    ASIDE_STARTED(killed_fence));
                clear_aside(killed_fence)
            :: else
            fi
        fi;
        killed_fence = 0; killed_attempt = 0 }
    od
}

/* put.lua */
proctype putter() {
    byte left = PUTS;
    do
#if defined(TAGS) && !defined(M_PUT_UNINDEXED)
    :: atomic { left && !putting -> indexed = 1; putting = 1 }
    :: atomic { left && putting && fences < FLIGHTS ->
        putting = 0;
#else
    :: atomic { left && fences < FLIGHTS ->
#endif
        left--; fences++;
        if
        :: fence -> conclude(version + 1, fences, 1, since)
        :: else -> store(version + 1, fences, since)
        fi;
        failure = 0; failure_fence = 0 }
    :: else -> break
    od
}

proctype refresher() {
    byte left = REFRESHES, won;
    do
    :: atomic { left && !won ->
        left--;
        ask_for_newer();
        if
        :: told == WIN -> won = got_fence
        :: else
        fi }
    :: atomic { won -> send(won, 0, 0); senders--; confirm(won); won = 0 }
    :: atomic { !left && !won -> break }
    od
}

/* A caller that ends before it learns the reply to its acquire, and will run nothing. */
proctype withdrawer() {
    byte left = WITHDRAWALS, won;
    bit claimed;
    do
    :: atomic { left && !won ->
        left--;
        acquire(0, 0, 0, NOBODY);
        if
        :: told == WIN -> won = got_fence
        :: told == WIN -> won = got_fence; claimed = 1; state = RUNNING; attempt = 1     /* inline, at once */
        :: told != WIN
        fi }
    :: atomic { won -> withdraw(won, claimed); senders--; won = 0; claimed = 0 }
    :: atomic { !left && !won -> break }
    od
}

proctype expirer() {
    byte left = EXPIRE_CALLS;
    do
    :: atomic { left -> left--; expire() }
    :: else -> break
    od
}

/* A value's TTL is over, or a flight's, a minute after its lease. Before that, a value's freshness is. And an index
 * forgets an entry that has neither a value nor a run. */
proctype expiry() {
end_expiry:
    do
#ifdef STALE
#ifdef LIVE
    :: atomic { expiring && entry && !stale -> expiring--; stale = 1 }
#else
    :: atomic { entry && !stale -> stale = 1 }
#endif
#endif
#ifdef TAGS
    :: atomic { indexed && !entry && !putting && !ANY_WORKER(IS_BUSY) -> indexed = 0 }
#endif
    :: atomic { expiring && entry -> expiring--; drop_entry() }
    :: atomic { expiring && MAY_PASS -> expiring--; clear_flight() }
    od
}

init {
    atomic {
        i = 0;
        do
        :: i < CALLERS -> run caller(i); i++
        :: else -> break
        od;
        i = 0;
        do
        :: i < WORKERS -> run worker(i); i++
        :: else -> break
        od;
#if INVALIDATIONS
        run invalidator();
#endif
#if PUTS
        run putter();
#endif
#if REFRESHES
        run refresher();
#endif
#if WITHDRAWALS
        run withdrawer();
#endif
#if DISOWNED
        run main_process();
#endif
#if EXPIRE_CALLS
        run expirer();
#endif
#if EXPIRIES || defined(STALE) || defined(TAGS)
        run expiry();
#endif
        skip
    }
}
