"""What a node finds out about its own failure domain, from its environment or a file."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from lightning_ckptless.errors import OptionsError
from lightning_ckptless.trainer.domains import own_domain


def test_the_environment_comes_before_the_file(tmp_path: Path) -> None:
    path = tmp_path / "racks"
    path.write_text(f"{socket.gethostname()} rack2\n")
    env = {"CKPTLESS_FAILURE_DOMAINS_FILE": str(path)}
    assert own_domain("rack", "some-node", env) == "rack2"
    assert own_domain("rack", "some-node", env | {"CKPTLESS_FAILURE_DOMAIN": "rack1"}) == "rack1"


def test_a_node_may_be_named_as_the_run_names_it(tmp_path: Path) -> None:
    path = tmp_path / "racks"
    path.write_text(f"{socket.gethostname()} rack2\nsome-node rack3\n")
    assert own_domain("rack", "some-node", {"CKPTLESS_FAILURE_DOMAINS_FILE": str(path)}) == "rack3"


def test_where_nobody_has_said_it_the_answer_says_how() -> None:
    with pytest.raises(OptionsError) as caught:
        own_domain("rack", "some-node", {})
    assert str(caught.value) == (
        f"failure_domain='rack': nobody has said in which rack host {socket.gethostname()} is: set "
        "CKPTLESS_FAILURE_DOMAIN=NAME on every node, or CKPTLESS_FAILURE_DOMAINS_FILE=FILE with a line 'HOST NAME' for "
        "every host; 'node' and 'rank' need neither"
    )


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(OptionsError, match=r"CKPTLESS_FAILURE_DOMAINS_FILE='.*/gone' cannot be read on host"):
        own_domain("rack", "some-node", {"CKPTLESS_FAILURE_DOMAINS_FILE": str(tmp_path / "gone")})
