"""What the tests of the programs share: running one, and reading the run it leaves."""

import json
import signal
import subprocess
import time

TIMEOUT = 300


class Program:
    """One of the remnant program's parts, such as `remnant lm`."""

    def __init__(self, program, name):
        self.program, self.name = str(program), name

    def command(self, *arguments):
        return [self.program, self.name, *map(str, arguments)]

    def __call__(self, *arguments, text="", code=0):
        result = subprocess.run(self.command(*arguments), input=text, capture_output=True, text=True,
                                encoding="utf-8", timeout=TIMEOUT)
        assert result.returncode == code, result.stderr + result.stdout
        return result

    def fails(self, *arguments, code=1, text=""):
        """The one sentence of a command that should fail."""
        result = self(*arguments, code=code, text=text)
        lines = [line for line in result.stderr.splitlines() if line.startswith("remnant: ")]
        assert len(lines) == 1, result.stderr
        assert "Exception raised" not in result.stderr
        return lines[0].removeprefix("remnant: ")

    def interrupted(self, number, run, *arguments):
        """Starts a training, sends it the signal after three steps, and returns the ended process and its errors."""
        # Not all ways of starting tests leave SIGINT at its default.
        process = subprocess.Popen(self.command("train", *arguments, "--out", run), stdout=subprocess.PIPE,
                                   stderr=subprocess.PIPE, text=True,
                                   preexec_fn=lambda: signal.signal(number, signal.SIG_DFL))
        try:
            deadline = time.monotonic() + 60
            while not (run / "metrics.jsonl").exists() or len(steps(run)) < 3:
                assert time.monotonic() < deadline and process.poll() is None
                time.sleep(0.005)
            process.send_signal(number)
            _, errors = process.communicate(timeout=60)
        finally:
            process.kill()
        return process, errors


def metrics(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def steps(run):
    return [line for line in metrics(run) if "loss" in line]


def losses(run):
    return [line["loss"] for line in steps(run)]


def summary(run):
    return json.loads((run / "summary.json").read_text())


def checkpoint_bytes(run):
    return {file.name: file.read_bytes() for file in sorted((run / "checkpoint").iterdir())}


def check_signal_and_resume(program, number, code, folder, *arguments):
    """A training stopped by the signal saves; resumed, it ends where one that nothing stopped does."""
    run, straight = folder / "parts", folder / "straight"
    process, errors = program.interrupted(number, run, *arguments)
    assert process.returncode == code, errors
    assert "interrupted: saved step" in errors and not (run / "summary.json").exists()
    done = len(losses(run))
    program("train", *arguments, "--out", run, "--resume")
    program("train", *arguments, "--out", straight)
    assert 3 <= done < len(losses(straight))
    assert checkpoint_bytes(run) == checkpoint_bytes(straight)
    assert losses(run) == losses(straight)


def compared(program, flag, settings, out, *arguments):
    """What compare.json says of a comparison, whose printed table has the same settings in order."""
    result = program("compare", *arguments, "--out", out, *(word for each in settings for word in (flag, each)))
    first = [line.split("  ")[0].strip() for line in result.stdout.splitlines() if "  " in line]
    assert [word for word in first if word in settings] == settings
    return json.loads((out / "compare.json").read_text())
