# Other scripts source this file. It makes .venv, and makes it again only if pyproject.toml or ci/constraints.txt changed.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export TOKENIZERS_PARALLELISM=false HF_HUB_DISABLE_TELEMETRY=1
wanted=$(cat pyproject.toml ci/constraints.txt | sha256sum)
if [ "$(cat .venv/made-from 2>/dev/null)" != "$wanted" ]; then
    python=${PYTHON:-python3}
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
        { echo "Python 3.11 or newer is needed; set PYTHON to one" >&2; exit 1; }
    echo "setting up .venv (once)"
    [ -x .venv/bin/python ] || "$python" -m venv .venv
    .venv/bin/python -m pip install --quiet --disable-pip-version-check -c ci/constraints.txt -e ".[dev,onnx]"
    echo "$wanted" > .venv/made-from
fi
PATH="$PWD/.venv/bin:$PATH"
