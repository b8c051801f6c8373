"""Commands are found in pages as a reader would find them, and none without a rule goes by."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.docs import commands
from tests.docs.commands import Block, Command
from tests.docs.rules import rule_of

PAGE = """\
```bash
# a comment alone
mlomae train --config x \\
    --seed 1   # and what it is for
mkdir -p 'a  #b' && \\
mlomae shards stats "a && b"
```

1. In a list:

    ```console
    $ mlomae doctor
    ok
    ```

```sh
for seed in 0 1; do
    mlomae train --seed $seed
done
```

```text
mlomae train of long ago
```
"""


@pytest.fixture
def page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "page.md").write_text(PAGE)
    monkeypatch.setattr(commands, "ROOT", tmp_path)
    monkeypatch.setattr(commands, "pages", lambda: ["page.md"])
    commands.blocks.cache_clear()
    return "page.md"


def test_commands_are_read_with_their_lines(page: str) -> None:
    found = [(command.line, command.text) for command in commands.commands(page)]
    assert found == [
        (3, "mlomae train --config x --seed 1"),
        (5, "mkdir -p 'a  #b'"),
        (5, 'mlomae shards stats "a && b"'),
        (12, "mlomae doctor"),
        (17, "for seed in 0 1; do\n    mlomae train --seed $seed\ndone"),
    ]


def test_commands_in_other_blocks_are_told(page: str) -> None:
    assert commands.shown_elsewhere(("mlomae",)) == ["page.md:23: mlomae train of long ago"]


def test_a_command_without_a_rule_is_refused() -> None:
    block = Block("docs/new.md", 7, "bash", "mlomae dream\n")
    with pytest.raises(AssertionError, match=r"^docs/new\.md:8: no rule says how to execute this command"):
        rule_of(Command(block, 8, "mlomae dream"))
