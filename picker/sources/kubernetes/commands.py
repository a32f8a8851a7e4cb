"""What the command lines in a pod give away. Commands may be shell scripts, so they are searched, not parsed."""

from __future__ import annotations

import re

from picker.sources.kubernetes.objects import Pod

# Scripts in manifests are a few KiB; more is not read.
_MAX_TEXT = 32 * 1024

_BOOTSTRAP = re.compile(r"--disaggregation-bootstrap-port[=\s]+[\"']?(\d{1,5})\b")
_RANK = re.compile(r"--(?:headless|node-rank)\b")


class Commands:
    """The command lines of one pod's containers, as one text."""

    def __init__(self, pod: Pod) -> None:
        words = [
            word
            for container in pod.spec.containers or ()
            for word in (*(container.command or ()), *(container.args or ()))
        ]
        self._text = " ".join(words)[:_MAX_TEXT]

    def bootstrap_port(self) -> str:
        """SGLang's `--disaggregation-bootstrap-port` as written; empty without it."""
        found = _BOOTSTRAP.search(self._text)
        return found[1] if found else ""

    def runs_sglang(self) -> bool:
        """Whether SGLang's server is started here."""
        return "sglang.launch_server" in self._text

    def is_rank(self) -> bool:
        """Whether one rank of an engine over several nodes is started here. All but the first have no API, although
        SGLang's answer health checks on the port of the API.
        """
        return _RANK.search(self._text) is not None
