"""deploy/: the gate's script end to end in a git repository; of the rest, what needs no platform."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import yaml
from lines import ENVIRONMENT, NAME, Project, finished
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from qcompress.schema.targets import TARGETS

DEPLOY = Path(__file__).parents[1] / "deploy"
SCRIPTS = ("gate.sh", "jetson/build.sh")
EMPTY_TREE = "4b825dc642cb6eb9a060e54bf8d69288fbee4904"
"""Digest of a folder without files, in every git repository."""

GOALS = {
    "test.perplexity": {"percent-max-degradation": 2},
    "onnx_bytes": {"percent-max-degradation": 5},
}


def document(name: str) -> Any:
    return yaml.safe_load((DEPLOY / name).read_text())


# The gate, as GitHub runs it --------------------------------------------------------------------------


class Repository:
    """A git repository with a recipe, what it names, and a baseline; `main` is the branch that passed."""

    def __init__(self, folder: Path, project: Project) -> None:
        self.folder = folder
        shutil.copytree(project.folder, folder, ignore=shutil.ignore_patterns("runs"))
        shutil.copytree(project.cache, folder / "runs" / ".cache")  # what the server kept of an earlier job
        (folder / ".gitignore").write_text("runs\n")
        self.git("init", "-q", "-b", "main")
        self.change(lambda recipe: recipe["gate"].update(regression=GOALS))
        self.qcompress("run", "recipe.yaml")
        self.qcompress("baseline", "promote", f"runs/{NAME}/latest", "--out", "baseline.json")
        self.commit("a baseline")

    def git(self, *words: str) -> str:
        identity = ("-c", "user.name=test", "-c", "user.email=test@example.org")
        return subprocess.run(("git", *identity, *words), cwd=self.folder, check=True, capture_output=True,
                              text=True).stdout  # fmt: skip

    def qcompress(self, *words: str) -> None:
        subprocess.run((sys.executable, "-m", "qcompress", *words), cwd=self.folder, check=True,
                       env=os.environ | ENVIRONMENT, capture_output=True)  # fmt: skip

    def change(self, edit: Any) -> None:
        file = self.folder / "recipe.yaml"
        recipe = yaml.safe_load(file.read_text())
        edit(recipe)
        file.write_text(yaml.safe_dump(recipe, sort_keys=False))

    def commit(self, message: str) -> None:
        self.git("add", "-A")
        self.git("commit", "-q", "-m", message)

    def branch(self, name: str, edit: Any) -> None:
        self.git("switch", "-q", "-c", name, "main")
        self.change(edit)
        self.commit(name)

    @property
    def reports(self) -> Path:
        return self.folder / "runs" / "reports"

    def gate(
        self, recipe: str = "recipe.yaml", github: bool = True, more: dict[str, str] | None = None
    ) -> tuple[int, list[str], str, str]:
        """The action's own step on what is checked out: exit code, annotations, all output, summary."""
        (step,) = [
            step for step in document("github/action.yml")["runs"]["steps"] if step.get("id") == "gate"
        ]
        given = {"github.action_path": str(DEPLOY / "github"), "inputs.recipe": recipe,
                 "inputs.baseline": "baseline.json", "inputs.runs": "runs"}  # fmt: skip
        fill = re.compile(r"\$\{\{ (.+?) \}\}")
        assert not fill.search(step["run"])  # an input pasted into a script could be a command
        values = {key: fill.sub(lambda found: given[found[1]], text) for key, text in step["env"].items()}
        files = {name: self.folder.parent / name for name in ("GITHUB_OUTPUT", "GITHUB_STEP_SUMMARY")}
        for file in files.values():
            file.write_text("")
        place = Path(sys.executable).parent  # where pip put the command
        environment = os.environ | ENVIRONMENT | values | {key: str(file) for key, file in files.items()}
        environment |= {"PATH": f"{place}:{os.environ['PATH']}", "GITHUB_ACTIONS": str(github).lower()}
        bases = ("QCOMPRESS_BASE", "GITHUB_BASE_REF", "CI_MERGE_REQUEST_DIFF_BASE_SHA")
        environment = environment | dict.fromkeys(bases, "") | (more or {})
        done = subprocess.run(("bash", "-e", "-o", "pipefail", "-c", step["run"]), cwd=self.folder,
                              env=environment, capture_output=True, text=True)  # fmt: skip
        assert files["GITHUB_OUTPUT"].read_text() == "reports=runs/reports\n"
        text = done.stdout + done.stderr
        notes = [line for line in text.splitlines() if line.startswith("::")]
        return done.returncode, notes, text, files["GITHUB_STEP_SUMMARY"].read_text()

    def report(self, name: str) -> Any:
        return json.loads((self.reports / name).read_text())


@pytest.fixture(scope="module")
def repository(tiny_model: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Repository:
    return Repository(tmp_path_factory.mktemp("deploy") / "repository", finished(tiny_model, text_file))


def test_a_change_that_costs_nothing_passes(repository: Repository) -> None:
    repository.branch("good", lambda recipe: recipe["train"]["phases"]["finetune"].update(steps=41))
    code, notes, text, summary = repository.gate()
    assert code == 0, text
    assert notes == ["::notice file=recipe.yaml,title=qcompress gate%3A accept::every goal holds"]
    assert summary.startswith("### qcompress gate: accept (tiny)") and "test.perplexity" in summary
    assert repository.report("gate.json")["verdict"] == repository.report("run.json")["verdict"]["verdict"]
    assert ElementTree.parse(repository.reports / "junit.xml").getroot().get("failures") == "0"
    assert repository.report("code-quality.json") == []


def test_a_change_that_makes_the_model_worse_fails_and_says_where(repository: Repository) -> None:
    worse = {"preset": "w8a8", "weights": {"bits": 2}, "embeddings": "float"}
    repository.branch("bad", lambda recipe: recipe.update(format=worse))
    code, notes, text, summary = repository.gate()
    assert code == 3, text
    start = "::error file=recipe.yaml,title=qcompress gate%3A regression::"
    assert len(notes) == 2 and all(note.startswith(start) for note in notes)
    assert "test.perplexity" in notes[0] and "onnx_bytes" in notes[1]
    assert summary.startswith("### qcompress gate: regression (tiny)")
    assert ElementTree.parse(repository.reports / "junit.xml").getroot().get("failures") == "3"
    findings = repository.report("code-quality.json")
    assert [finding["location"]["path"] for finding in findings] == ["recipe.yaml"] * 2


@pytest.fixture(scope="module")
def loosened(repository: Repository) -> Repository:
    """A pull request with a worse model that loosens the baseline's goals, too."""
    worse = {"preset": "w8a8", "weights": {"bits": 2}, "embeddings": "float"}
    repository.branch("loose", lambda recipe: recipe.update(format=worse))
    file = repository.folder / "baseline.json"
    values = json.loads(file.read_text())
    for goal in values["goals"]["regression"].values() if "goals" in values else ():
        goal["percent-max-degradation"] = 10_000
    file.write_text(
        json.dumps(values).replace('percent-max-degradation": 2', 'percent-max-degradation": 9999')
    )
    repository.commit("loosened")
    return repository


@pytest.mark.slow
@pytest.mark.parametrize("server", ["GitHub", "GitLab", "another"])
def test_a_request_cannot_loosen_the_baseline_that_judges_it(server: str, loosened: Repository) -> None:
    repository = loosened
    main = repository.git("rev-parse", "main").strip()
    repository.git("update-ref", "refs/remotes/origin/main", main)
    base = {
        "GitHub": {"GITHUB_BASE_REF": "main"},
        "GitLab": {"CI_MERGE_REQUEST_DIFF_BASE_SHA": main},
        "another": {"QCOMPRESS_BASE": "main"},
    }[server]
    code, notes, text, _ = repository.gate(github=server == "GitHub", more=base)
    assert code == 3 and "this request changes baseline.json" in text, text
    if server == "GitHub":
        assert notes[0].startswith("::notice file=baseline.json,")


def test_the_commit_of_the_target_branch_must_be_there(repository: Repository) -> None:
    code, notes, _, _ = repository.gate(more={"GITHUB_BASE_REF": "nowhere"})
    assert code == 2 and "fetch-depth: 0" in notes[0]


@pytest.mark.slow
def test_the_first_baseline_is_the_request_s_own(repository: Repository) -> None:
    repository.git("switch", "-q", "-f", "main")
    empty = repository.git("commit-tree", "-m", "none", EMPTY_TREE).strip()
    code, _, text, _ = repository.gate(github=False, more={"QCOMPRESS_BASE": empty})
    assert code == 0 and "brings the first one" in text, text


def test_actions_are_pinned_by_commit() -> None:
    steps = (
        document("github/action.yml")["runs"]["steps"]
        + document("github/workflow.yml")["jobs"]["gate"]["steps"]
    )
    used = [step["uses"] for step in steps if "uses" in step and not step["uses"].startswith("./")]
    assert len(used) == 4 and all(re.fullmatch(r"actions/[a-z-]+@[0-9a-f]{40}", one) for one in used)
    text = (DEPLOY / "github/action.yml").read_text() + (DEPLOY / "github/workflow.yml").read_text()
    assert len(re.findall(r"@[0-9a-f]{40} # v\d+\.\d+\.\d+", text)) == 4


def test_servers_run_without_privileges() -> None:
    triton = document("triton/compose.yaml")["services"]["triton"]
    assert triton["read_only"] and triton["cap_drop"] == ["ALL"] and triton["tmpfs"] == ["/tmp"]
    assert triton["security_opt"] == ["no-new-privileges:true"] and triton["user"] != "0:0"
    parts = yaml.safe_load_all((DEPLOY / "triton/kubernetes.yaml").read_text())
    (pod,) = [part["spec"]["template"]["spec"] for part in parts if part["kind"] == "Deployment"]
    assert pod["automountServiceAccountToken"] is False
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    (container,) = pod["containers"]
    rights = container["securityContext"]
    assert rights["readOnlyRootFilesystem"] and not rights["allowPrivilegeEscalation"]
    places = {one["name"]: one["mountPath"] for one in container["volumeMounts"]}
    assert places == {"models": "/models", "shared": "/dev/shm", "scratch": "/tmp"}
    assert {one["name"] for one in pod["volumes"]} == set(places)
    dockerfile = (DEPLOY / "server/Dockerfile").read_text()
    assert re.findall(r"^USER (\S+)$", dockerfile, re.M) == ["10001"]


@pytest.mark.slow
def test_a_change_that_looks_at_less_is_not_taken_for_a_good_one(repository: Repository) -> None:
    repository.branch("less", lambda recipe: recipe["data"]["evaluate"]["test"].update(limit=6))
    code, notes, text, _ = repository.gate()
    assert code == 4, text
    assert "samples" in notes[0] and "anomalous" in notes[0]


def test_a_run_that_ends_early_leaves_no_older_reports_behind(repository: Repository) -> None:
    repository.reports.mkdir(parents=True, exist_ok=True)
    (repository.reports / "junit.xml").write_text("of an earlier job")
    repository.branch("broken", lambda recipe: recipe.update(method="quadaptor"))
    code, notes, text, _ = repository.gate()
    assert code == 2 and "quadaptor" in text
    assert [note.split("::", 2)[2] for note in notes] == [
        "the run ended with exit code 2 and has no result to judge; see the job's log"
    ]
    assert not (repository.reports / "junit.xml").exists()


def test_a_recipe_that_is_not_there_is_named_before_anything_runs(repository: Repository) -> None:
    code, notes, text, _ = repository.gate("other.yaml", github=False)
    assert code == 2 and not notes
    assert text.startswith("error: other.yaml does not exist; a baseline is made with: qcompress baseline")


# Scripts and descriptions -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", SCRIPTS)
def test_scripts_are_executable_and_clean(name: str) -> None:
    assert os.access(DEPLOY / name, os.X_OK)
    subprocess.run(("bash", "-n", DEPLOY / name), check=True)
    if checker := shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}"):
        done = subprocess.run((checker, DEPLOY / name), capture_output=True, text=True)
        assert done.returncode == 0, done.stdout


def test_the_action_hands_its_inputs_to_the_script_and_keeps_the_reports() -> None:
    action = document("github/action.yml")
    steps = action["runs"]["steps"]
    assert action["runs"]["using"] == "composite"
    assert all(step["shell"] == "bash" for step in steps if "run" in step)
    used = set(re.findall(r"inputs\.([a-z-]+)", (DEPLOY / "github/action.yml").read_text()))
    assert used == set(action["inputs"])
    assert steps[-1]["if"] == "always()" and steps[-1]["uses"].startswith("actions/upload-artifact@")
    assert action["outputs"]["reports"]["value"] == "${{ steps.gate.outputs.reports }}"


def test_the_workflow_names_inputs_that_the_action_has() -> None:
    workflow, action = document("github/workflow.yml"), document("github/action.yml")
    assert workflow["permissions"] == {"contents": "read"}
    (step,) = [step for step in workflow["jobs"]["gate"]["steps"] if step["uses"] == "./deploy/github"]
    required = {name for name, value in action["inputs"].items() if value.get("required")}
    assert required <= set(step["with"]) <= set(action["inputs"])


def test_the_gitlab_job_reports_what_the_script_writes() -> None:
    job = document("gitlab/qcompress-gate.yml")["qcompress-gate"]
    assert job["script"][-1] == 'bash "$GATE" "$RECIPE" "$BASELINE" "$RUNS"'
    assert (DEPLOY.parent / job["variables"]["GATE"]).samefile(DEPLOY / "gate.sh")
    written = re.findall(r"\$reports/([a-z-]+\.\w+)", (DEPLOY / "gate.sh").read_text())
    for report in job["artifacts"]["reports"].values():
        assert report.startswith("$RUNS/reports/") and report.rpartition("/")[2] in written
    assert job["artifacts"]["when"] == "always"


def test_triton_is_served_from_one_folder_by_compose_and_kubernetes_alike() -> None:
    service = document("triton/compose.yaml")["services"]["triton"]
    claim, deployment, front = yaml.safe_load_all((DEPLOY / "triton/kubernetes.yaml").read_text())
    pod = deployment["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert service["command"] == container["args"]
    assert service["volumes"][0].endswith(":/models:ro")
    mounts = {mount["name"]: mount for mount in container["volumeMounts"]}
    assert mounts["models"] == {"name": "models", "mountPath": "/models", "readOnly": True}
    claims = [volume["persistentVolumeClaim"]["claimName"] for volume in pod["volumes"]
              if "persistentVolumeClaim" in volume]  # fmt: skip
    assert claims == [claim["metadata"]["name"]]
    assert deployment["spec"]["selector"]["matchLabels"] == front["spec"]["selector"]
    assert {port["targetPort"] for port in front["spec"]["ports"]} == {
        port["name"] for port in container["ports"]
    }
    (image,) = document("triton/kustomization.yaml")["images"]
    assert image["name"] == container["image"]


def test_the_server_image_copies_files_that_exist_and_names_a_real_target() -> None:
    text = (DEPLOY / "server/Dockerfile").read_text()
    for line in re.findall(r"^COPY (.+)$", text, flags=re.MULTILINE):
        for name in line.split()[:-1]:
            assert (DEPLOY.parent / name).exists()
    (named,) = re.findall(r"--target (\S+)", text)
    assert TARGETS[named].backend == "tensorrt"


# Packages by their hashes --------------------------------------------------------------------------------


LOCKS = ("requirements.txt", "requirements-base.txt")


def pinned(file: Path) -> dict[str, tuple[str, list[str]]]:
    """Version and sha256 of each requirement by normalized name; anything else in the file is an error."""
    lines = file.read_text().replace("\\\n", " ").splitlines()
    found = {}
    for line in (line for line in lines if line and not line.startswith("#")):
        entry = re.fullmatch(
            r"([A-Za-z0-9._-]+)==([^\s;]+)( ;[^#]*?)?((?: +--hash=sha256:[0-9a-f]{64})*)", line
        )
        assert entry, line
        name = canonicalize_name(entry[1])
        assert name not in found, name
        found[name] = (entry[2], re.findall(r"sha256:(\w+)", entry[4]))
    return found


@pytest.mark.parametrize("name", LOCKS)
def test_every_package_has_its_hash_and_the_version_of_the_constraints(name: str) -> None:
    lock, constraints = pinned(DEPLOY / name), pinned(DEPLOY.parent / "constraints.txt")
    assert all(hashes and len(set(hashes)) == len(hashes) for _, hashes in lock.values())
    both = lock.keys() & constraints.keys()
    assert {key: lock[key][0] for key in both} == {key: constraints[key][0] for key in both}
    assert not any(hashes for _, hashes in constraints.values())  # pip would ask for those of all packages


def test_the_lists_hold_what_the_package_and_its_build_ask_for() -> None:
    project = project_file()
    extras = project["project"]["optional-dependencies"]
    base = [*project["project"]["dependencies"], *project["build-system"]["requires"]]
    machine = {"python_version": "3.11", "python_full_version": "3.11.0", "sys_platform": "linux",
               "platform_machine": "x86_64", "platform_system": "Linux", "os_name": "posix"}  # fmt: skip
    asked = dict(zip(LOCKS, ([*base, *extras["train"], *extras["rtx"]], base), strict=True))
    for name, requirements in asked.items():
        lock = pinned(DEPLOY / name)
        for requirement in map(Requirement, requirements):
            if requirement.marker is None or requirement.marker.evaluate(machine):
                assert requirement.specifier.contains(lock[canonicalize_name(requirement.name)][0])
    everything = pinned(DEPLOY / LOCKS[0])
    assert all(everything[key][0] == version for key, (version, _) in pinned(DEPLOY / LOCKS[1]).items())


def test_ci_and_the_container_install_nothing_without_its_hash_but_the_package_itself() -> None:
    steps = document("github/action.yml")["runs"]["steps"]
    (step,) = [step for step in steps if "pip install" in step.get("run", "")]
    assert step["env"]["LOCK"] == "${{ github.action_path }}/../requirements.txt"
    job = document("gitlab/qcompress-gate.yml")["qcompress-gate"]
    assert (DEPLOY.parent / re.findall(r"-r (\S+)", "\n".join(job["script"]))[0]).samefile(DEPLOY / LOCKS[0])
    container = (DEPLOY / "server/Dockerfile").read_text()
    assert f"deploy/{LOCKS[1]}" in container
    for text in (step["run"], "\n".join(job["script"]), container):
        first, second = re.findall(r"pip install (.+)", text)
        assert "--require-hashes -r" in first and "--no-deps --no-build-isolation" in second
    version = document("github/action.yml")["inputs"]["python-version"]["default"]
    assert job["image"] == f"python:{version}" and f"Python {version}," in (DEPLOY / LOCKS[0]).read_text()


def project_file() -> dict[str, Any]:
    tomllib = pytest.importorskip("tomllib")  # Python 3.11
    return tomllib.loads((DEPLOY.parent / "pyproject.toml").read_text())


def test_the_server_image_copies_all_that_the_build_reads() -> None:
    project = project_file()
    wheel = project["tool"]["hatch"]["build"]["targets"]["wheel"]
    read = ["pyproject.toml", project["project"]["readme"], *project["project"]["license-files"],
            *wheel["packages"], *wheel["force-include"]]  # fmt: skip
    lines = re.findall(r"^COPY (.+) \S+$", (DEPLOY / "server/Dockerfile").read_text(), flags=re.MULTILINE)
    copied = {name for line in lines for name in line.split()}
    assert {Path(name).parts[0] for name in read} <= copied


# A Jetson, played --------------------------------------------------------------------------------------


class Jetson:
    """A folder with a run whose engine is deferred, and stand-ins for the device's commands."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        run = folder / "run"
        (run / "engine").mkdir(parents=True)
        (run / "probe").mkdir()
        (run / "model.onnx").write_text("")
        (run / "probe" / "measure_engine.py").write_text(
            "import sys; open(sys.argv[4], 'w').write(open(sys.argv[2]).read() + ' measured')"
        )
        for part in ("engine_runners.py", "engine_speed.py", "strict_json.py"):
            (run / "probe" / part).write_text("")
        self.command(
            "qcompress build model.onnx --target orin-jp6 --out engine --profiles '[{\"batch\": [1]}]'"
        )
        self.model = folder / "model"
        self.model.write_bytes(b"NVIDIA Jetson Orin Nano Developer Kit\0")
        modules = folder / "modules"
        modules.mkdir()
        (modules / "tensorrt.py").write_text("")
        tool = folder / "bin" / "qcompress"
        tool.parent.mkdir()
        tool.write_text(
            "#!/usr/bin/env python3\nimport json, os, pathlib, sys\n"
            "json.dump(sys.argv[1:], open('said.json', 'w'))\n"
            "out = pathlib.Path(sys.argv[sys.argv.index('--out') + 1]); out.mkdir()\n"
            "(out / 'model.plan').write_text('plan')\n"
            "sys.exit(int(os.environ.get('FAILS', 0)))\n"
        )
        tool.chmod(0o755)

    def command(self, text: str | None) -> None:
        (self.folder / "run" / "engine" / "build.json").write_text(json.dumps({"command": text}))

    def build(self, *words: str, **environment: str) -> tuple[int, str]:
        given = {"PATH": f"{self.folder / 'bin'}:{os.environ['PATH']}", "JETSON_MODEL_FILE": str(self.model),
                 "PYTHONPATH": str(self.folder / "modules")}  # fmt: skip
        script, environment = DEPLOY / "jetson/build.sh", os.environ | given | environment
        done = subprocess.run(("bash", script, *words), cwd=self.folder, env=environment,
                              capture_output=True, text=True)  # fmt: skip
        return done.returncode, done.stdout + done.stderr


@pytest.fixture
def jetson(tmp_path: Path) -> Jetson:
    return Jetson(tmp_path)


def test_a_jetson_builds_what_the_run_deferred_and_measures_it(jetson: Jetson) -> None:
    code, text = jetson.build("run", "made here")
    assert code == 0, text
    assert json.loads((jetson.folder / "said.json").read_text()) == [
        "build", "run/model.onnx", "--target", "orin-jp6", "--out", "made here",
        "--profiles", '[{"batch": [1]}]',
    ]  # fmt: skip
    assert (jetson.folder / "made here" / "engine.json").read_text() == "plan measured"
    assert "qcompress verify RUN --engine engine.json" in text


@pytest.mark.parametrize(
    "part", ["measure_engine.py", "engine_runners.py", "engine_speed.py", "strict_json.py"]
)
def test_a_kit_that_was_copied_in_part_is_refused_before_anything_is_built(part: str, jetson: Jetson) -> None:
    (jetson.folder / "run" / "probe" / part).unlink()
    code, text = jetson.build("run", "out")
    assert code == 2 and f"run/probe/{part} is missing" in text
    assert not (jetson.folder / "out").exists()


def test_what_a_jetson_lacks_is_said_before_anything_is_built(jetson: Jetson) -> None:
    broken, bare = jetson.folder / "broken", jetson.folder / "bare"
    for folder in (jetson.folder / "there", broken, bare):
        folder.mkdir()
    (broken / "tensorrt.py").write_text("raise ImportError('no tensorrt')")
    (bare / "python3").symlink_to(sys.executable)
    faults = {
        "there exists": (2, ("run", "there"), {}),
        "usage": (2, (), {}),
        "is missing; copy the whole run": (2, ("elsewhere",), {}),
        "this is no Jetson": (6, ("run",), {"JETSON_MODEL_FILE": "/dev/null"}),
        "sudo apt install python3-libnvinfer": (6, ("run",), {"PYTHONPATH": str(broken)}),
        "pip install qcompress": (6, ("run",), {"PATH": f"{bare}:/usr/bin:/bin"}),
    }
    for message, (expected, words, environment) in faults.items():
        code, text = jetson.build(*words, **environment)
        assert code == expected and message in text, (message, text)
    jetson.command(None)
    code, text = jetson.build("run")
    assert code == 2 and "defers no build to a device" in text
    assert not (jetson.folder / "said.json").exists()


def test_a_build_that_fails_ends_the_script_with_its_code(jetson: Jetson) -> None:
    code, _ = jetson.build("run", FAILS="5")
    assert code == 5 and not (jetson.folder / "engine" / "engine.json").exists()
