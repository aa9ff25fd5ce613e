"""Who waits for what, and why it is not loaded yet."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from memory_efficient_gpt_server.registry.events import AdminLoad, AdminUnload, LeaseReleased, Loaded
from memory_efficient_gpt_server.registry.ledger import Budget
from memory_efficient_gpt_server.registry.queue_view import queue_view
from memory_efficient_gpt_server.registry.records import Policy
from memory_efficient_gpt_server.registry.variants import HOST
from tests.server.registry.registry_driver import GPU, A, B, C, Driver, elastic, size


def view(driver: Driver) -> dict[str, Any]:
    return queue_view(driver.state, driver.now_s, lambda waiter: f"op-{waiter}")


def whys(driver: Driver) -> dict[str, str]:
    return {group["model"]: group["why"]["code"] for group in view(driver)["groups"]}


def test_nobody_waits() -> None:
    seen = view(Driver())
    assert (seen["waiting"], seen["groups"], seen["loading"]) == (0, [], 0)
    assert seen["churn"] == {"swaps": 0, "most_swaps": 20, "window_s": 120.0, "wait_s": 0.0}


def test_a_model_that_is_loading_is_told_with_its_end() -> None:
    driver = Driver(Policy(load_bytes_per_s=6.0))
    driver.ask(A)
    driver.ask(A, after_s=1.0)
    driver.feed(AdminLoad(900, A, size()), 1.0)
    (group,) = view(driver)["groups"]
    assert (group["model"], group["position"], group["state"]) == ("A", 1, "loading")
    assert (group["waiting"], group["waited_s"]) == (3, 2.0)
    assert (group["why"]["code"], group["why"]["eta_s"]) == ("loading", 8.0)
    assert group["waiters"] == [
        {"kind": "request", "operation": None, "waited_s": 2.0, "gives_up_in_s": 298.0},
        {"kind": "request", "operation": None, "waited_s": 1.0, "gives_up_in_s": 299.0},
        {"kind": "operation", "operation": "op-900", "waited_s": 0.0, "gives_up_in_s": 300.0},
    ]


def test_what_is_in_the_way_is_named() -> None:
    driver = Driver()
    driver.load(A)
    driver.ask(B)
    (group,) = view(driver)["groups"]
    why = group["why"]
    assert (why["code"], why["blocked_by"], why["eta_s"]) == ("busy", ["A"], None)
    assert (why["needed_bytes"], why["missing_bytes"]) == ({GPU: 60}, {GPU: 20})
    assert not group["impatient"]
    driver.tick(21.0)
    (group,) = view(driver)["groups"]
    assert group["impatient"] and group["why"]["blocked_by"] == ["A"]


def test_bytes_that_are_being_freed_are_waited_for() -> None:
    driver = Driver()
    driver.load_idle(A)
    driver.ask(B)
    assert whys(driver) == {"B": "after_freeing"}
    driver.gone(A)
    assert whys(driver) == {"B": "loading"}


def test_those_behind_may_not_count_on_what_is_kept_for_those_ahead() -> None:
    driver = Driver()
    driver.load_idle(A)
    driver.ask(B)
    driver.ask(C, size(60), after_s=1.0)
    first, second = view(driver)["groups"]
    assert (first["model"], second["model"], second["position"]) == ("B", "C", 2)
    assert first["why"]["code"] == "after_freeing"
    assert (second["why"]["code"], second["why"]["missing_bytes"]) == ("busy", {GPU: 80})


def test_a_load_for_which_idle_models_will_give_kv_memory_evicts_nobody() -> None:
    driver = Driver(Policy(max_loads=1), kv_soft_limit_bytes=10)
    driver.load_idle(A, elastic(30, kv_bytes=40))
    driver.ask(B, size(5))  # takes the only slot
    driver.ask(C, size(40))
    driver.state = replace(driver.state, policy=Policy(max_loads=2))
    why = view(driver)["groups"][1]["why"]
    assert (why["code"], why["evict"], why["missing_bytes"]) == ("after_shrinking", [], {GPU: 15})


def test_loads_at_a_time_are_limited() -> None:
    driver = Driver(Policy(max_loads=1))
    driver.ask(A, size(10))
    driver.ask(B, size(10))
    assert whys(driver) == {"A": "loading", "B": "load_slots"}
    assert view(driver)["loading"] == view(driver)["most_loading"] == 1


def test_swaps_that_are_held_back_are_told_with_their_time() -> None:
    driver = Driver(Policy(most_swaps=1, churn_window_s=50.0), {GPU: Budget(130)})
    driver.load_idle(A)
    driver.load(C, size(60))  # in use: swaps would cost it
    driver.ask(B)
    driver.gone(A)
    driver.feed(AdminUnload(900, B))  # calls the load off
    driver.gone(B)
    driver.load_idle(A)
    driver.ask(B)
    seen = view(driver)
    why = seen["groups"][0]["why"]
    assert (why["code"], why["evict"]) == ("churn_limited", ["A"])
    assert why["wait_s"] == seen["churn"]["wait_s"] == 49.0 and seen["churn"]["swaps"] == 1


def test_who_would_sleep_for_a_load_is_told_apart_from_who_would_leave() -> None:
    budgets = {GPU: Budget(130), HOST: Budget(120)}
    driver = Driver(Policy(most_swaps=1, churn_window_s=50.0), budgets)
    sleeper = size(60, can_sleep=True)
    driver.load_idle(A, sleeper)
    driver.load(C, size(60))  # in use: swaps would cost it
    lease = driver.ask(B, sleeper)
    driver.slept(A)
    driver.feed(Loaded(B, sleeper))
    driver.feed(LeaseReleased(lease, B))
    driver.ask(A, sleeper)
    why = view(driver)["groups"][0]["why"]
    assert (why["code"], why["evict"], why["sleep"]) == ("churn_limited", [], ["B"])


def test_one_whose_old_process_still_ends_waits_for_that() -> None:
    driver = Driver()
    driver.load_idle(A)
    driver.ask(B)  # A goes
    driver.ask(A)
    assert whys(driver)["A"] == "unloading"
