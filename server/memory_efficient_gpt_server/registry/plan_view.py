"""Plans and ledgers as JSON objects.

Purpose: one shape for POST /admin/plan, GET /admin/memory and the plan in an insufficient_memory error.
Does not know: HTTP, how plans come about.
Invariant: sizes are bytes, times seconds; what is not known is null. A model as configured goes by its id,
another variant by the id and what is special: `writer[quantization=int4]`.
"""

from __future__ import annotations

from typing import Any

from memory_efficient_gpt_server.registry.joint_planning import JointPlan
from memory_efficient_gpt_server.registry.ledger import Ledger
from memory_efficient_gpt_server.registry.planning import Plan
from memory_efficient_gpt_server.registry.victims import Way


def plan_view(plan: Plan) -> dict[str, Any]:
    """What loading would mean."""
    return {
        "fits": plan.fits,
        "verdict": str(plan.verdict),
        "bytes": {str(kind): size for kind, size in plan.bytes.items()},
        "needed_bytes": dict(plan.needed),
        "reservable_bytes": dict(plan.reservable),
        "evict": [str(key) for key in plan.evict],
        "sleep": [str(key) for key in plan.sleep],
        "shrink_kv_bytes": {str(key): size for key, size in plan.shrink.items()},
        "blocked_by": [str(key) for key in plan.blocked_by],
        "eta_s": plan.eta_s,
        "alternatives": [{"variant": one.label, **plan_view(one.plan)} for one in plan.alternatives],
    }


def joint_plan_view(plan: JointPlan) -> dict[str, Any]:
    """What loading several would mean, in the words of one load's plan and of `megpt plan`."""
    return {
        "fits": plan.fits,
        "verdict": str(plan.verdict),
        "needed_bytes": dict(plan.needed),
        "reservable_bytes": dict(plan.reservable),
        "evict": [str(key) for key in plan.victims.by(Way.EVICT)],
        "sleep": [str(key) for key in plan.victims.by(Way.SLEEP)],
        "shrink_kv_bytes": {str(key): size for key, size in plan.victims.kv_bytes.items()},
        "blocked_by": [str(key) for key in plan.blocked_by],
        "eta_s": plan.eta_s,
        "loads": [
            {
                "model": load.key.model_id,
                "variant": str(load.key),
                "fits": load.fits,
                "verdict": str(load.verdict),
                "bytes": {str(kind): size for kind, size in load.bytes.items()},
                "needed_bytes": dict(load.needed),
            }
            for load in plan.loads
        ],
        "would_fit": [
            {
                "text": change.text,
                "loads": [str(key) for key in change.keys],
                "needed_bytes": dict(change.needed),
            }
            for change in plan.would_fit
        ],
    }


def ledger_view(ledger: Ledger) -> dict[str, Any]:
    """Every device, and who has what on it."""
    return {
        "devices": {
            device: {
                "budget_bytes": budget.total_bytes,
                "used_bytes": ledger.used[device],
                "freeing_bytes": ledger.freeing[device],
                "leaked_bytes": ledger.leaked_bytes(device),
                "available_bytes": ledger.available_bytes(device),
            }
            for device, budget in ledger.budgets.items()
        },
        "entries": [
            {
                "owner": str(entry.owner),
                "device": entry.device,
                "kind": str(entry.kind),
                "stage": str(entry.stage),
                "bytes": entry.bytes,
            }
            for entries in ledger.entries.values()
            for entry in entries
        ],
    }
