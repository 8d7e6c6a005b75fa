#!/usr/bin/env bash
# Run a recipe, then hold the result against a committed baseline: the same script for every CI server.
#
#   gate.sh RECIPE BASELINE [RUNS]
#
# RECIPE and BASELINE are paths from the repository's root, where the script is started. RUNS (runs) is kept
# between jobs where the server can: its cache makes a run that changes nothing take seconds. RUNS/reports gets
# run.json, gate.json, junit.xml and code-quality.json, whatever the verdict. On GitHub it also prints
# annotations and appends to the step summary.
#
# In a pull or merge request the baseline and its goals are those of the target branch (GITHUB_BASE_REF of
# GitHub, CI_MERGE_REQUEST_DIFF_BASE_SHA of GitLab, QCOMPRESS_BASE anywhere: any name of a commit), so that a
# request cannot loosen what judges it. One that changes BASELINE is told so. The checkout must have that commit.
# A BASELINE that the target branch lacks is the request's own: the first one.
#
# Exit code: the gate's (0 accept, 3 regression or inconclusive, 4 anomalous). Where there is nothing to judge,
# the run's (2 recipe, 5 lint, export or build, 6 machine, 7 in use); where the gate accepts a run that breaks
# the goals of its own recipe, the run's too.
set -euo pipefail

if [[ $# -lt 2 || $# -gt 3 ]]; then
    echo "usage: gate.sh RECIPE BASELINE [RUNS]" >&2
    exit 2
fi
recipe=$1 baseline=$2 runs=${3:-runs}
reports=$runs/reports
github=${GITHUB_ACTIONS:-false}

data() { # TEXT: as GitHub wants the text of a command, so that no name of a file ends it
    local text=${1//'%'/%25}
    text=${text//'##['/'##\x5b'}
    text=${text//$'\r'/%0D}
    text=${text//$'\n'/%0A}
    printf '%s' "${text//[[:cntrl:]]/?}"
}

property() { # TEXT: as GitHub wants a property of a command
    local text
    text=$(data "$1")
    text=${text//:/%3A}
    printf '%s' "${text//,/%2C}"
}

complain() { # TEXT: on the recipe's line in a pull request, or on stderr
    if [[ $github == true ]]; then
        printf '::error file=%s,title=qcompress gate::%s\n' "$(property "$recipe")" "$(data "$1")"
    else
        printf 'error: %s\n' "${1//[[:cntrl:]]/?}" >&2
    fi
}

notice() { # TEXT: beside the result
    if [[ $github == true ]]; then
        echo "::notice file=$baseline,title=qcompress gate::$1"
    else
        echo "notice: $1" >&2
    fi
}

base_commit() { # prints the commit of the target branch; nothing outside a pull or merge request
    if [[ -n ${QCOMPRESS_BASE:-} ]]; then
        echo "$QCOMPRESS_BASE"
    elif [[ $github == true && -n ${GITHUB_BASE_REF:-} ]]; then
        echo "refs/remotes/origin/$GITHUB_BASE_REF"
    else
        echo "${CI_MERGE_REQUEST_DIFF_BASE_SHA:-}"
    fi
}

base=$(base_commit)
judge=$baseline
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
if [[ -n $base ]]; then
    if ! commit=$(git rev-parse --verify --quiet --end-of-options "$base^{commit}"); then
        complain "the commit of the target branch, $base, is not in this checkout; fetch it (fetch-depth: 0)"
        exit 2
    fi
    if git cat-file -e "$commit:./$baseline" 2>/dev/null; then
        judge=$scratch/baseline.json
        git show "$commit:./$baseline" >"$judge"
        if ! cmp -s "$judge" "$baseline"; then
            notice "this request changes $baseline; it is judged by that of the target branch"
        fi
    else
        notice "the target branch has no $baseline: this request brings the first one, and is judged by it"
    fi
fi

for file in "$recipe" "$judge"; do
    if [[ ! -f $file ]]; then
        complain "$file does not exist; a baseline is made with: qcompress baseline promote RUN --out $baseline"
        exit 2
    fi
done
rm -rf "$reports" # what an earlier job left would be taken for this one's
mkdir -p "$reports"

ran=0
qcompress run "$recipe" --out "$runs" --json >"$reports/run.json" || ran=$?
if [[ $ran != 0 && $ran != 3 && $ran != 4 || ! -s $reports/run.json ]]; then
    complain "the run ended with exit code $ran and has no result to judge; see the job's log"
    exit $((ran == 0 ? 1 : ran))
fi
candidate=$(python3 -c 'import json, sys; print(json.load(open(sys.argv[1]))["path"])' "$reports/run.json")

options=(--baseline "$judge" --candidate "$candidate" --recipe-file "$recipe"
    --junit "$reports/junit.xml" --code-quality "$reports/code-quality.json")
if [[ $github == true ]]; then
    options+=(--github)
fi
gated=0
qcompress gate "${options[@]}" || gated=$?
if [[ -f $candidate/gate.json ]]; then
    cp "$candidate/gate.json" "$reports/gate.json"
fi
if [[ $gated != 0 ]]; then
    exit "$gated"
fi
if [[ $ran != 0 ]]; then
    complain "the gate accepts, but the run breaks the goals of its own recipe (exit code $ran)"
fi
exit "$ran"
