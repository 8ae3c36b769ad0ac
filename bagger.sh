#!/usr/bin/env bash
# BAgger on one page: train, roll out, play backwards, add to the data, train again.
#
#   bash bagger.sh                  the whole method on a toy world, 2 CPU cores, no download but pip's
#   QUICK=1 bash bagger.sh          the same in minutes, at sizes that prove nothing but the plumbing
#   WAN=Wan2.1-T2V-1.3B VIDEOS=clips/ bash bagger.sh       the paper, on all GPUs of this machine
#   PET_NNODES=2 PET_NODE_RANK=0 PET_MASTER_ADDR=host0 WAN=... bash bagger.sh       and, on another machine
#                                   with the same disk, rank 1; these variables are torchrun's own
#
# Each stage takes more flags from a variable of its own, split at spaces, as in EVAL="--weights vbench":
#   PREPARE prepare.py, TRAIN train_df.py, ROLLOUT rollout.py, AGGREGATE aggregate.py, SAMPLE sample.py,
#   EVAL eval_drift.py; and MAKE is for both stages that generate, rollout.py and sample.py.
#
# Every stage goes on where it was killed and leaves alone what is done; so does this file, started again.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
nodes=${PET_NNODES:-1} node=${PET_NODE_RANK:-0}     # machines, and which of them this is

WAN=${WAN:-}                # a Wan2.1 directory; none: the toy world
VIDEOS=${VIDEOS:-}          # videos with captions, as prepare.py takes them
SEED=${SEED:-0}
INIT=${INIT:-base}          # what every round's training begins with: base (the paper) or previous
refuse() { echo "bagger.sh: $*" >&2; exit 2; }
PREPARE=${PREPARE:-} ROLLOUT=${ROLLOUT:-} AGGREGATE=${AGGREGATE:-} SAMPLE=${SAMPLE:-} EVAL=${EVAL:-}
if [ "$WAN" ]; then
    OUT=${OUT:-run}
    ROUNDS=${ROUNDS:-3}     # model_0 is the seed model, model_ROUNDS the last
    STEPS=${STEPS:-16000}   # of each training
    LENGTH=${LENGTH:-50}    # seconds of the videos that are evaluated
    TRAIN=${TRAIN:-} MAKE=${MAKE:-}
    BASELINES=${BASELINES-1}    # also the seed model with the paper's two other ways to sample; empty: not
    PROMPTS=${PROMPTS:-$here/prompts.txt}
    [ -d "$WAN" ] || refuse "WAN: no such folder: $WAN"
    [ "$VIDEOS" ] || refuse "VIDEOS is missing: a folder of videos with captions, a list (.jsonl .csv" \
        ".parquet) or .tar shards"
elif [ "${QUICK:-}" ]; then
    OUT=${OUT:-quick_run} ROUNDS=${ROUNDS:-1} STEPS=${STEPS:-4} LENGTH=${LENGTH:-6} CLIPS=12 STARTS=9
    TRAIN=${TRAIN:-"--batch 4 --micro 4 --lr 1e-3 --shift 3 --held-out 2 --log-every 1 --preview-every 0"}
    MAKE=${MAKE:-"--steps 2 --guidance 3 --shift 3 --batch 16"}
else
    OUT=${OUT:-toy_run} ROUNDS=${ROUNDS:-3} STEPS=${STEPS:-900} LENGTH=${LENGTH:-24} CLIPS=600 STARTS=48
    TRAIN=${TRAIN:-"--batch 16 --micro 16 --lr 1e-3 --warmup 50 --beta2 0.99 --ema 0.995 --shift 3
                    --log-every 50 --eval-every 450 --save-every 200 --preview-every 0"}
    MAKE=${MAKE:-"--steps 10 --guidance 1 --shift 3 --batch 16"}
    PREPARE=${PREPARE:-"--batch 8"} AGGREGATE=${AGGREGATE:-"--batch 8"}
fi

if ! [ "${PYTHON:-}" ]; then
    PYTHON=$here/.venv/bin/python installed=$here/.venv/installed.txt   # written last: the install is whole
    if ! cmp -s "$here/requirements.txt" "$installed" && [ "$node" = 0 ]; then
        echo "== making $here/.venv"
        python3 -m venv "$here/.venv"
        "$PYTHON" -m pip install --quiet --disable-pip-version-check -r "$here/requirements.txt"
        cp "$here/requirements.txt" "$installed"
    fi
    cmp -s "$here/requirements.txt" "$installed" || echo "== waiting for node 0 to make $here/.venv"
    until cmp -s "$here/requirements.txt" "$installed"; do sleep 2; done
fi
if [ "$WAN" ]; then
    NPROC=${NPROC:-gpu}     # processes here; gpu: one for each
else
    NPROC=${NPROC:-$("$PYTHON" -c 'import os; print(min(4, len(os.sched_getaffinity(0))))')}
fi
one() { if [ "$node" = 0 ]; then "$PYTHON" "$here/$1" "${@:2}"; fi; }   # in one process of the whole job
# A node that is ahead waits for the others at the next stage. Each stage has a port of its own, lest it meets
# the stage before, and half a day for all nodes to come, as ranks have for one another
port=${PET_MASTER_PORT:-29500}
if [ "$nodes" = 1 ]; then   # a free port, so that two runs can share a machine
    export PET_RDZV_BACKEND=${PET_RDZV_BACKEND:-c10d} PET_RDZV_ENDPOINT=${PET_RDZV_ENDPOINT:-localhost:0}
fi
export PET_RDZV_CONF=${PET_RDZV_CONF:-timeout=43200}
all() {
    if [ "$nodes" = 1 ] && { [ "$NPROC" = 1 ] || ! [ "$WAN" ]; }; then
        RANKS=$NPROC one "$@"   # on a CPU a stage forks itself, which starts faster than torchrun
    else OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} PET_MASTER_PORT=$port "$PYTHON" -m torch.distributed.run \
        --nproc-per-node "$NPROC" "$here/$1" "${@:2}"; fi
    port=$((port + 1))
}
stage() {   # and when it began, for bench.py times
    printf '\n== %s (%d:%02d since the start)\n' "$*" $((SECONDS / 60)) $((SECONDS % 60))
    if [ "$node" = 0 ]; then printf '%s\t%s\n' "$SECONDS" "$*" >> "$OUT/times.txt"; fi
}

mkdir -p "$OUT" || refuse "OUT: $OUT cannot be made"
if [ "$node" = 0 ]; then : > "$OUT/times.txt"; fi
if [ "$WAN" ]; then
    base=$WAN
    one bench.py plan --wan "$WAN" --videos "$VIDEOS" --out "$OUT" --rounds "$ROUNDS" --nproc "$NPROC" \
        --nodes "$nodes" --prompts "$PROMPTS" --seconds "$LENGTH" ${BASELINES:+--baselines} \
        "--prepare=$PREPARE" "--train=$TRAIN --steps $STEPS" "--rollout=$MAKE $ROLLOUT" \
        "--aggregate=$AGGREGATE" "--sample=$MAKE $SAMPLE" "--eval=$EVAL"
else
    stage "a toy world"
    one toy.py --out "$OUT/toy" --clips "$CLIPS" --starts "$STARTS" --seed "$SEED"
    base=$OUT/toy/wan VIDEOS=$OUT/toy/videos PROMPTS=$OUT/toy/prompts.jsonl
fi

# ------------------------------------------------------------------------------------------- Algorithm 1
stage "seed data"
all prepare.py --videos "$VIDEOS" --wan "$base" --out "$OUT/agg_0" --seed "$SEED" $PREPARE
init=$base
for ((k = 0; k <= ROUNDS; k++)); do
    stage "round $k of $ROUNDS: train model_$k"
    all train_df.py --data "$OUT/agg_$k" --init "$init" --out "$OUT/model_$k" $TRAIN --steps "$STEPS" \
        --seed "$SEED"
    if [ "$INIT" = previous ]; then init=$OUT/model_$k; fi
    if ((k < ROUNDS)); then
        stage "round $k of $ROUNDS: roll model_$k out"
        all rollout.py --model "$OUT/model_$k" --data "$OUT/agg_0" --out "$OUT/rollout_$k" --round "$k" \
            --seed "$SEED" $MAKE $ROLLOUT
        stage "round $k of $ROUNDS: play the rollouts backwards, add them to the data"
        all aggregate.py --data "$OUT/agg_$k" --rollouts "$OUT/rollout_$k" --out "$OUT/agg_$((k + 1))" \
            $AGGREGATE
    fi
done

# ------------------------------------------------------------------------------------------- what came of it
methods=()
videos() {  # what the report calls them, the model, a folder, more flags
    stage "videos of $LENGTH s from $2, the same prompts and noise for all: $1"
    all sample.py --model "$OUT/$2" --prompts "$PROMPTS" --seconds "$LENGTH" --out "$OUT/$3" --seed "$SEED" \
        $MAKE $SAMPLE "${@:4}"
    methods+=("$1=$OUT/$3")
}
videos DF model_0 videos_0
if [ "${BASELINES:-}" ]; then
    videos "DF (sigma_test = 0.2)" model_0 videos_0_noised --context-noise 0.2
    videos "History Guidance" model_0 videos_0_history --history-guidance 1.2
fi
for ((k = 1; k <= ROUNDS; k++)); do videos "R$k" "model_$k" "videos_$k"; done
stage "drift"
all eval_drift.py "${methods[@]}" --out "$OUT/report" $([ "$WAN" ] || echo --toy --real "$OUT/toy/videos") \
    $EVAL
stage "done: open $OUT/report/report.html; rollouts are shown in $OUT/rollout_*/preview.png"
if [ "${QUICK:-}" ]; then
    echo "QUICK=1: every stage ran, on models that have learnt nothing; their numbers mean nothing."
fi
