"""Which models are loaded, which wait, and who owns every byte: pure functions over frozen values.

Purpose: the decisions of a server with many models, made by `reducer.step(state, event, now)`.
Does not know: processes, sockets, clocks, asyncio, HTTP, torch. An owner feeds events and runs the effects.
Invariant: the same state, event and time always give the same new state and effects.

    variants      what can be loaded: keys, entries, estimates      ledger    bytes, their owners and stages
    states        the life of a variant                             load_queue  who waits, churn, failures
    records       everything the registry knows (RegistryState)     victims   whom to evict or put to sleep
    planning      does it fit, at what cost, when                   draft     one step's work in progress
    events, effects   what comes in and what goes out               scheduling, admin, kv_sharing, reducer
"""
