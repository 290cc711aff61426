#!/usr/bin/env bash
# The first hour of a stranger with pictures of their own, as ten walks. Each prints PASS or FAIL and its seconds.
# Needs `pip install -e '.[dev]'` and no GPU; minutes on two idle cores, much longer on busy ones. tests/walk.sh [NUMBER …]
# walks some of them.
# The exit status is 1 if a walk failed; its last lines are printed, and the very last names the line of this file that failed.
set -u
root=$(cd "$(dirname "$0")/.." && pwd)
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
export PYTHONPATH="$root:$root/kernels${PYTHONPATH:+:$PYTHONPATH}"

tiny=(--model.patch 8 --model.depth 1 --model.width 64 --train.batch 4 --train.warmup_images 4 --sample.steps 2)
short=("${tiny[@]}" --train.images 40)

verb() { python "$root/fastdit/$1.py" "${@:2}"; }
says() { grep -qE -- "$1" "$2" || { echo "missing: $1"; tail -3 "$2"; return 1; }; }
exits() { # exits CODE COMMAND …: it ends with that status
    local code=0
    "${@:2}" || code=$?
    [ "$code" = "$1" ] || { echo "status $code, not $1: ${*:2}"; return 1; }
}
refuses() { # refuses PATTERN COMMAND …: status 2, and one line that says this
    exits 2 "${@:2}" 2>error
    [ "$(wc -l <error)" = 1 ] || { cat error; return 1; }
    says "$1" error
}
setting() { # setting RUN GROUP.FIELD: as the run's config.json has it
    python -c "import json, sys; g, f = sys.argv[2].split('.'); print(json.load(open(f'{sys.argv[1]}/config.json'))[g][f])" "$@"
}
pictures() { # pictures FOLDER MODE WIDTH HEIGHT CLASS …: six for each class, a dark circle in their middle
    python - "$@" <<'END'
import sys
from pathlib import Path
from PIL import Image, ImageDraw
folder, mode, width, height, *names = sys.argv[1:]
x, y, r = int(width) // 2, int(height) // 2, min(int(width), int(height)) * 7 // 16
for name in names or [""]:
    (Path(folder) / name).mkdir(parents=True)
    for i in range(6):
        image = Image.new(mode, (int(width), int(height)), "white")
        ImageDraw.Draw(image).ellipse((x - r, y - r, x + r, y + r), fill=10 * i if mode == "L" else (10 * i, 0, 60))
        image.save(Path(folder) / name / f"{i}.png")
END
}
terminal() { # terminal COMMAND …: on one of forty columns that knows ASCII alone
    python - "$@" <<'END'
import fcntl, os, pty, struct, sys, termios
os.environ.update(LANG="C", LC_ALL="C", PYTHONIOENCODING="ascii", PYTHONUTF8="0", TERM="xterm")
child, ours = pty.fork()
if not child:
    fcntl.ioctl(0, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 40, 0, 0))
    os.execvp(sys.argv[1], sys.argv[1:])
said = b""
try:
    while part := os.read(ours, 65536):
        said += part
except OSError:  # the other end is closed
    pass
sys.stdout.buffer.write(said)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) or not said.isascii())
END
}
soonest() { # soonest SECONDS COMMAND …: its first line comes within them, in the best of three tries
    python - "$@" <<'END'
import subprocess, sys, time
best = 1e9
for _ in range(3):
    start = time.monotonic()
    child = subprocess.Popen(sys.argv[2:], stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    child.stdout.readline()
    best = min(best, time.monotonic() - start)
    child.kill()
    child.wait()
print(f"first line after {best:.2f} s")
sys.exit(best > float(sys.argv[1]))
END
}

walk_1() { : "beside busy processes training keeps its fair share"
    python "$root/bench/bench_busy.py" --spins 2000 --rounds 3 --seconds 1 --least 0.8
}

walk_2() { : "pictures are cropped, not squashed"
    pictures wide RGB 256 64
    for crop in center random none; do
        verb train --data.path wide --data.crop "$crop" --data.packs "$crop" --run.name "$crop" "${short[@]}"
    done
    python - <<'END'
import json
from pathlib import Path
import numpy as np
for crop in ("center", "random", "none"):
    [pack] = [path.parent for path in Path(crop).glob("*/manifest.json")]
    pixels = np.fromfile(pack / "data.bin", np.uint8, 6 * 3 * 32 * 32).reshape(6, 3, 32, 32)[:, 0]
    dark = [(np.ptp(rows) + 1, np.ptp(columns) + 1) for rows, columns in (np.nonzero(p < 128) for p in pixels) if len(rows)]
    print(crop, *dark)
    if crop == "center":
        assert all(abs(high - wide) <= 1 and high >= 26 for high, wide in dark) and len(dark) == 6
    if crop == "none":
        assert all(high > 3 * wide for high, wide in dark) and len(dark) == 6
END
}

walk_3() { : "the path alone decides: source, classes, channels, the run's name"
    pictures "my cats" RGB 48 48 tabby black
    pictures grey L 40 40
    verb train --data.path "my cats" "${short[@]}"
    [ "$(setting runs/my-cats model.num_classes)" = 2 ]
    verb train --data.path grey --data.image_size 64 64 "${short[@]}"
    [ "$(setting runs/grey model.channels)" = 1 ]
    [ "$(setting runs/grey model.num_classes)" = 0 ]
    [ "$(setting runs/grey model.input_size)" = "[64, 64]" ]
    [ ! -e runs/cats ]
    refuses "--data.path ./nowhere: no such folder or file" verb train --data.path ./nowhere
}

walk_4() { : "fine-tuning takes what fits"
    pictures colour RGB 40 40 a b c
    pictures grey L 40 40
    verb train --data.path colour "${short[@]}"
    verb train --data.path grey --data.image_size 64 64 --run.name other --train.init_from runs/colour "${short[@]}" | tee out
    says "^started from runs/colour: .*interpolated from 4×4 to 8×8" out
    says "3 channels there, 1 here" out
    verb export runs/colour --out exported
    verb train --data.path colour --run.name again --train.init_from exported "${short[@]}" | tee out
    says "^started from exported: ([0-9]+) of \1 tensors" out
    refuses "starts a run with --model.depth 1" \
        verb train --data.path colour --run.name deep --train.init_from exported "${short[@]}" --model.depth 3
}

walk_5() { : "a run goes on by its folder, and is changed on purpose"
    pictures mine RGB 40 40
    verb train --data.path mine "${short[@]}" --train.images 20
    verb train runs/mine | tee out
    says "resumed at 20 images" out
    mv mine moved
    verb train runs/mine --train.images 40 --lr 1e-3 --data.path moved | tee out
    says "^changed on purpose, from 20 images on: .*images" out
    says "^changed on purpose, from 20 images on: .*lr" out
    says "^finished: 40 images" out
}

walk_6() { : "what does not fit is refused in a line"
    pictures mine RGB 40 40
    refuses "batch 100,000 is more than the 6 images" verb train --data.path mine "${short[@]}" --train.batch 100000
    refuses "GB|GiB" verb train --data.path mine "${short[@]}" --model.width 8192 --model.depth 96
    [ ! -e runs/mine/checkpoints ]
}

walk_7() { : "a broken tracker costs a line"
    mkdir -p broken/tensorboard
    echo 'raise ImportError("cannot import name builder from google.protobuf")' >broken/tensorboard/__init__.py
    pictures mine RGB 40 40
    PYTHONPATH="$PWD/broken:$PYTHONPATH" verb train --data.path mine "${short[@]}" >out 2>&1
    says "TensorBoard" out
    says "^finished: 40 images" out
    ! grep Traceback out
}

walk_8() { : "classes keep their names"
    pictures clothes RGB 40 40 bag coat
    verb train --data.path clothes "${short[@]}"
    verb sample runs/clothes --num_images 4 --label coat | tee out
    says "class1" out
    verb sample runs/clothes --num_images 4
    verb export runs/clothes --format release
    says "coat" runs/clothes/export-release/README.md
    (cd runs/clothes/export-release && sha256sum -c SHA256SUMS)
    refuses "classes 0 … 1 \(bag, coat\); did you mean bag" verb sample runs/clothes --label bags
}

walk_9() { : "python and torchrun start it; exit codes are clear; Ctrl-C is safe"
    pictures mine RGB 40 40
    exits 2 verb train --data.path mine --train.batch 0
    python "$root/fastdit/train.py" --data.path mine "${tiny[@]}" --train.images 400000 >out &
    local run=$! code=0
    trap "kill $run 2>/dev/null || true" EXIT
    for _ in $(seq 300); do ! grep -q img/s out || break; sleep 0.2; done
    kill -INT "$run"
    wait "$run" || code=$?
    [ "$code" = 130 ]
    says "^stopped by signal 2 at" out
    torchrun --nproc-per-node 2 "$root/fastdit/train.py" --data.path mine --run.name two "${short[@]}" --train.batch 2
    [ -s runs/two/samples/000000040.png ]
    torchrun --nproc-per-node 2 "$root/fastdit/sample.py" runs/two --num_images 4
}

walk_10() { : "help, the first word, narrow ASCII terminals, the plan, the report"
    soonest 1 python "$root/fastdit/train.py"
    soonest 2 python "$root/fastdit/train.py" --help
    verb train --help >out
    [ "$(wc -l <out)" -le 40 ]
    verb train --help all >out
    says "spike.sigma" out
    pictures mine RGB 40 40
    terminal python "$root/fastdit/train.py" --data.path mine "${short[@]}" --lr 1e-3 | tee out
    python - <<'END'
text = open("out", errors="replace").read().replace("\r", "")
assert "starting: loading PyTorch\n" in text
assert "+\n\n" in text, "the bar is glued to the panel"
END
    terminal python "$root/fastdit/sample.py" runs/mine --num_images 4
    terminal python "$root/fastdit/report.py" runs/mine
    python -c "t = open('runs/mine/report.html').read(); assert 0 < t.index('<img') < t.index('<h2>Training')"
    terminal python "$root/fastdit/plan.py" cats-256 --gpus 8
    verb plan cats-256 --gpus 8 | head -1 | tee out
    says "^cats-256 fits on 8 × .*take about" out
}

failed=0
for number in "${@:-1 2 3 4 5 6 7 8 9 10}"; do
    for n in $number; do
        name=$(declare -f "walk_$n" | sed -n 's/^ *: "\(.*\)";*$/\1/p')
        start=$SECONDS
        mkdir -p "$scratch/$n"
        (
            set -eEuo pipefail
            trap 'echo "line $LINENO, called from ${BASH_LINENO[*]}: $BASH_COMMAND"' ERR
            cd "$scratch/$n"
            "walk_$n"
        ) >"$scratch/$n.log" 2>&1
        code=$?
        printf '%s %4d s  %2d  %s\n' "$([ "$code" = 0 ] && echo PASS || echo FAIL)" $((SECONDS - start)) "$n" "$name"
        if [ "$code" != 0 ]; then
            failed=1
            tail -12 "$scratch/$n.log" | sed 's/^/    /'
        fi
        rm -rf "${scratch:?}/$n"
    done
done
exit "$failed"
