"""The console: a live line on a terminal, plain lines at intervals elsewhere."""

import io

from trainer.metrics.console import Console, duration


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def train(step: int, **timing) -> dict:
    return {"step": step, "split": "train", "loss": 1.5, "bpb": 2.25, "timing": timing}


def plain(steps: int = 100, interval: float = 10.0):
    file, clock = io.StringIO(), Clock()
    return Console(steps, file=file, interval=interval, clock=clock), file, clock


def test_a_plain_line_has_step_time_left_loss_bits_and_speed():
    console, file, clock = plain()
    console.update(train(1))
    clock.now += 20
    console.update(train(21, tokens_per_second=45_234.0, mfu=0.4123))
    assert file.getvalue().splitlines()[1] == ("step 21/100  21 %  ETA 1:19  loss 1.5000  bpb 2.2500  45.2k tok/s  MFU 41.2 %")


def test_the_time_left_leaves_out_what_came_before_the_first_row():
    console, file, clock = plain()
    clock.now += 500  # compilation
    console.update(train(1))
    clock.now += 10
    console.update(train(11))
    assert "ETA -:--" in file.getvalue().splitlines()[0] and "ETA 1:29" in file.getvalue().splitlines()[1]


def test_an_unknown_peak_shows_as_not_available():
    console, file, _ = plain()
    console.update(train(1, mfu=None))
    assert "MFU n/a" in file.getvalue()


def test_plain_lines_come_at_intervals_and_at_the_end():
    console, file, clock = plain(steps=50, interval=10)
    for step in range(1, 51):
        console.update(train(step))
        clock.now += 1
    console.close()
    steps = [int(line.split("/")[0].split()[1]) for line in file.getvalue().splitlines()]
    assert steps == [1, 11, 21, 31, 41, 50]


def test_the_last_row_is_shown_when_a_run_stops_early():
    console, file, _ = plain()
    console.update(train(1))
    console.update(train(2))
    console.close()
    console.close()
    assert [line.split()[1] for line in file.getvalue().splitlines()] == ["1/100", "2/100"]


def test_an_evaluation_stays_on_the_screen():
    console, file, _ = plain()
    console.evaluation({"step": 1200, "split": "val", "loss": 1.25, "bpb": 1.8, "accuracy": 0.5, "timing": {"seconds": 1.0}})
    assert file.getvalue() == "step 1,200  evaluation  loss 1.2500  bpb 1.8000  accuracy 0.5000\n"


def test_a_terminal_gets_one_live_line_and_no_thread_draws_it():
    import threading

    file, clock, before = io.StringIO(), Clock(), threading.active_count()
    with Console(100, file=file, terminal=True, clock=clock) as console:
        assert threading.active_count() == before
        for step in range(1, 101):
            console.update(train(step, tokens_per_second=1e6))
            clock.now += 0.01
        console.say("kept [not markup]")
    text = file.getvalue()
    assert "step 100/100" in text and "kept [not markup]" in text
    assert text.count("step ") < 30  # drawn four times a second, not for every row


def test_non_finite_losses_are_shown():
    console, file, _ = plain()
    console.update({"step": 1, "split": "train", "loss": float("nan")})
    assert "loss nan" in file.getvalue()


def test_durations():
    assert [duration(s) for s in (0, 65, 3723, 90_000)] == ["0:00", "1:05", "1:02:03", "1 d 01:00"]
