"""Plans and ledgers as JSON objects.

Purpose: one shape for POST /admin/plan, GET /admin/memory and the plan in an insufficient_memory error.
Does not know: HTTP, how plans come about.
Invariant: sizes are bytes, times seconds; what is not known is null. A model as configured goes by its id,
another variant by the id and what is special: `writer[quantization=int4]`.
"""

from __future__ import annotations

from typing import Any

from memory_efficient_gpt_server.registry.ledger import Ledger
from memory_efficient_gpt_server.registry.planning import Plan


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
