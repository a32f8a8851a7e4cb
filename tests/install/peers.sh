#!/bin/sh
# Makes the two environments of `PEERS=1 python -m bench`: .venv-peers-sglang and .venv-peers-vllm, from locked versions.
# They are apart from ours and from each other: their requirements differ. Does nothing for what is up to date.
# `peers.sh --lock` resolves peers-sglang.txt and peers-vllm.txt again from the .in files beside them.
set -eu

here=$(cd "$(dirname "$0")" && pwd)
root=$(cd "$here/../.." && pwd)
python=${PYTHON:-python3.11}
export PIP_DISABLE_PIP_VERSION_CHECK=1

for peer in sglang vllm; do
    venv=$root/.venv-peers-$peer
    lock=$here/peers-$peer.txt
    if [ "${1:-}" = --lock ]; then
        "$root/.venv/bin/uv" pip compile --quiet --no-header --python-version 3.11 --generate-hashes \
            --no-emit-index-url --no-annotate "$here/peers-$peer.in" -o "$lock"
        continue
    fi
    if [ "$venv/.installed" -nt "$lock" ]; then
        continue
    fi
    test -x "$venv/bin/python" || "$python" -m venv "$venv"
    "$venv/bin/python" -m pip install --quiet --require-hashes -r "$lock"
    touch "$venv/.installed"
done
