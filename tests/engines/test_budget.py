from __future__ import annotations

import pytest
from ignite.engine import Engine, Events

from regpipe.engines import handlers
from regpipe.engines.handlers import Budget
from regpipe.utils.errors import InputError


def test_training_ends_with_the_epoch_in_which_the_seconds_are_spent(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(handlers.time, "monotonic", lambda: clock[0])

    def epochs(budget: Budget) -> int:
        engine = Engine(lambda engine, batch: clock.__setitem__(0, clock[0] + 1))  # a second an iteration
        budget.attach(engine)
        saved: list[int] = []
        engine.add_event_handler(Events.EPOCH_COMPLETED, lambda engine: saved.append(engine.state.epoch))
        engine.run([0, 1, 2], max_epochs=10)
        assert saved == list(range(1, engine.state.epoch + 1))  # handlers after it see the last epoch too
        return engine.state.epoch

    assert epochs(budget := Budget(7)) == 3  # 3, 6, 9 seconds
    state = budget.state_dict()
    assert budget.spent == pytest.approx(9 / 7)
    assert epochs(Budget()) == 10
    resumed = Budget(12)
    resumed.load_state_dict(state)
    assert epochs(resumed) == 1
    spent = Budget(5)
    spent.load_state_dict(state)
    assert epochs(spent) == 0
    with pytest.raises(InputError, match="more than 0"):
        Budget(0)
