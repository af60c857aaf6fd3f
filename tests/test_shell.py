"""What shells, terminals and batch systems do to a run: paths, printed commands, signals, output nobody reads."""

import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest
import torch
from helpers import DIGITS, ROOT, act_at, assert_close, assert_one_line, load, run, train

import evaluate
import train_classifier
import train_gan
import train_likelihood
from engine import compiler, errors, flags
from engine.checkpoint import write_atomically
from engine.errors import Stopped, UserError, shell
from engine.folder import new_folder
from engine.run import Run

pytestmark = pytest.mark.skipif(os.name == "nt", reason="POSIX shells, signals and links")

MLP = [*DIGITS, "--model", "mlp", "--epochs", "2"]


def parse(words):
    return flags.parse_args(train_classifier.get_args_parser(), train_classifier.RECIPES, None, words)


# Folders and files ----------------------------------------------------------------------------------------------------
def test_a_link_that_leads_nowhere_is_named_with_its_target(tmp_path):
    links = {"runs": "/scratch/gone", "link": "elsewhere", "loop": "loop"}
    for name, target in links.items():
        (tmp_path / name).symlink_to(target)
    (tmp_path / "file").touch()
    for wanted, words in (
        (None, r"runs is a link to /scratch/gone, which is missing\); create that"),
        ("runs/mine", "runs is a link to /scratch/gone, which is missing"),
        *((name, f"{name} is a link to {target}, which is missing") for name, target in links.items()),
        *((name, "file is a file") for name in ("file", "file/mine")),
    ):
        with pytest.raises(UserError, match=words):
            new_folder(wanted, "mlp-digits")


def test_a_link_to_a_folder_is_a_folder(tmp_path):
    (tmp_path / "disk").mkdir()
    for name in ("runs", "mine"):
        (tmp_path / name).symlink_to("disk")
    (tmp_path / "disk" / "mlp").symlink_to("gone")  # a name that is taken
    assert new_folder(None, "mlp") == Path("runs/mlp-2")
    (tmp_path / "disk" / "mlp-2").rmdir()
    (tmp_path / "disk" / "mlp").unlink()
    assert new_folder("mine", "mlp") == Path("mine")


FOREIGN = [
    *((name, [], "not empty; name a new folder$") for name in ("config.json", ".lock", "checkpoint.pt.mine.tmp")),
    *((name, ["--auto-resume"], words) for name, words in (("theirs.txt", "not empty"), ("checkpoint.pt", "damaged"))),
]


@pytest.mark.parametrize(("name", "flags", "words"), FOREIGN)
def test_files_of_theirs_are_not_taken_for_those_of_a_run(name, flags, words):
    Path("run").mkdir()
    Path("run", name).write_text('{"options": 5}')
    with pytest.raises(UserError, match=f"run.* is {words}"):
        train(*MLP, *flags, "--output-dir", "run")
    assert [path.name for path in Path("run").iterdir()] == [name]
    assert Path("run", name).read_text() == '{"options": 5}'


def test_a_folder_of_a_run_that_ended_before_its_first_step_can_be_used_again(monkeypatch):
    words = [*MLP, "--dry-run", "--output-dir", "run"]
    with monkeypatch.context() as patched:
        patched.setattr(Run, "save", lambda self: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            train(*words)
    assert {path.name for path in Path("run").iterdir()} == {".lock", "config.json"}
    Path("run/checkpoint.pt.0123abcd.tmp").write_bytes(b"killed while writing")
    train(*words)
    assert load("run/checkpoint.pt")["epoch"] == 1


def test_new_runs_take_the_next_free_folder_even_in_the_same_moment():
    with ThreadPoolExecutor(8) as pool:
        folders = list(pool.map(new_folder, [None] * 8, ["cnn-mnist"] * 8))
    assert {str(path) for path in folders} == {"runs/cnn-mnist", *(f"runs/cnn-mnist-{i}" for i in range(2, 9))}
    assert all(path.is_dir() for path in folders)


def test_processes_that_write_the_same_file_do_not_meet(tmp_path):
    contents = [bytes([i]) * 1000 for i in range(8)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(partial(write_atomically, tmp_path / "seen.png"), contents * 20))
    assert (tmp_path / "seen.png").read_bytes() in contents
    assert [path.name for path in tmp_path.iterdir()] == ["seen.png"]


def test_paths_of_the_home_folder_and_files_of_a_run(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    train(*MLP, "--dry-run", "--output-dir=~/mine")
    assert not Path("~").exists()
    for name in ("~/mine", "~/mine/checkpoint.pt", "~/mine/best.pt", str(tmp_path / "home/mine/metrics.csv")):
        (tmp_path / "home" / "mine" / "best.pt").touch()
        assert parse([f"--resume={name}"]).resume == str(tmp_path / "home" / "mine")
    assert parse(["--start-from=~/mine"]).start_from == str(tmp_path / "home" / "mine")
    args = parse(["--data-dir=~/data", "--dataset=~/few"])
    assert [args.data_dir, args.dataset] == [str(tmp_path / "home" / name) for name in ("data", "few")]
    args = evaluate.get_args_parser().parse_args(["~/a", "--data-dir=~/b", "--image=~/c"])
    assert [args.run, args.data_dir, *args.image] == [str(tmp_path / "home" / name) for name in "abc"]
    with pytest.raises(SystemExit, match="2"):
        parse(["--resume="])  # "$RUN", which is not set: not a new run


# Commands -------------------------------------------------------------------------------------------------------------
def test_a_name_that_is_too_long_is_one_line_with_a_remedy():
    with pytest.raises(UserError, match=r"could not be written \(File name too long\); .* or use another name"):
        write_atomically(Path("a" * 250), b"")


@pytest.mark.parametrize("name", ["my runs/first", "-x", "a\\n\tb"])
def test_a_printed_path_is_one_line_and_reaches_a_program_as_it_is(name):
    line = shell("cat", Path(name))
    assert "\n" not in line
    Path(name).parent.mkdir(exist_ok=True)
    Path(name).write_text("found")
    assert subprocess.run(["sh", "-c", line], capture_output=True, text=True, check=True).stdout == "found"


def hang_up():
    sys.argv[0] = "repo/train_classifier.py"
    signal.raise_signal(signal.SIGHUP)


def test_the_printed_commands_work_from_where_the_user_stands(tmp_path):
    """The scripts are called by a relative path from another folder."""
    (tmp_path / "repo").symlink_to(ROOT)
    name, code, before = "-my $runs", 128 + signal.SIGHUP, partial(act_at, (0, 3), hang_up)
    _, errors = run("train_classifier.py", *MLP, f"--output-dir={name}", cwd=tmp_path, code=code, before=before)
    assert_one_line(errors, "resume with: ", " repo/train_classifier.py ")
    line = errors.partition("resume with: ")[2]
    for _ in range(2):  # resume, then evaluate
        done = subprocess.run(["sh", "-c", line], capture_output=True, text=True)
        assert done.returncode == 0, line + done.stderr
        line = done.stdout.partition("now evaluate it: ")[2]
    assert (tmp_path / name / "evaluation" / "metrics.json").is_file()


def test_remedies_can_be_pasted_too():
    train(*MLP, "--dry-run", "--output-dir", "my run")
    with pytest.raises(UserError, match="not empty; name a new folder, or use --resume 'my run'"):
        train(*MLP, "--output-dir", "my run")
    with pytest.raises(UserError, match=r"classifier; resume it with: .*train_classifier\.py --resume 'my run'"):
        train_gan.main(["--resume", "my run"])


# Signals and output ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGXCPU])
def test_a_signal_that_comes_twice_saves_the_last_step(number):
    act_at((0, 3), lambda: [signal.raise_signal(number) for _ in range(2)])
    with pytest.raises(Stopped) as caught:
        train(*MLP, "--output-dir", "run")
    assert caught.value.args[0] == number
    assert load("run/checkpoint.pt")["batch"] == 4


@pytest.mark.parametrize(("torchrun", "epochs"), [(False, 2), (True, 0)])
def test_a_hangup_that_nohup_ignores_stays_ignored(monkeypatch, torchrun, epochs):
    """torchrun does not ignore it: it sends it to its processes, and kills them when they do not end."""
    monkeypatch.setattr(errors.dist, "is_torchelastic_launched", lambda: torchrun)
    monkeypatch.setattr("engine.distributed.join", lambda device: device)
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    act_at((0, 3), partial(signal.raise_signal, signal.SIGHUP))
    try:
        train(*MLP, "--output-dir", "run")
    except Stopped:
        assert torchrun
    finally:
        signal.signal(signal.SIGHUP, before)
    assert load("run/checkpoint.pt")["epoch"] == epochs


def closed():
    for number in range(3):
        os.close(number)
    sys.stdout = sys.stderr = None


def unread():
    end, other = os.pipe()
    os.close(end)
    for number in (1, 2):
        os.dup2(other, number)


@pytest.mark.parametrize("before", [closed, unread])
def test_output_that_nobody_reads_does_not_end_a_training(tmp_path, before):
    run("train_classifier.py", *MLP, "--output-dir", "run", cwd=tmp_path, before=before)
    assert load("run/checkpoint.pt")["epoch"] == 2


@pytest.mark.slow
def test_what_the_terminal_cannot_show_is_escaped(monkeypatch):
    monkeypatch.setenv("PYTHONIOENCODING", "cp1252")
    script = [sys.executable, str(ROOT / "train_classifier.py"), *MLP, "--dry-run", "--output-dir", "数"]
    done = subprocess.run(script, capture_output=True)
    assert (done.returncode, done.stderr) == (0, b"")
    assert rb"run folder: \u6570" in done.stdout


def test_ctrl_c_while_the_step_is_compiled_gives_it_up_and_saves(tmp_path, monkeypatch, capsys):
    def compile_step(*args):
        signal.raise_signal(signal.SIGINT)
        time.sleep(100)

    train(*MLP, "--output-dir", "whole")
    monkeypatch.setattr(compiler, "compile_step", compile_step)
    with pytest.raises(Stopped):
        train(*MLP, "--compile", "--output-dir", "run")
    assert "not compiled: interrupted" in capsys.readouterr().out
    assert load("run/checkpoint.pt")["batch"] == 2
    train("--resume", "run", "--no-compile")
    assert_close(tmp_path / "whole", tmp_path / "run")


@pytest.mark.parametrize("script", ["train_gan.py", "benchmarks/compare.py"])
def test_ctrl_c_while_torch_is_imported_is_one_line(script):
    command = [sys.executable, "-X", "importtime", str(ROOT / script), "--help"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    for line in process.stderr:
        if "torch" in line:  # one of its modules has been imported
            process.send_signal(signal.SIGINT)
            break
    lines = [line for line in process.communicate()[1].splitlines() if not line.startswith("import time:")]
    assert process.returncode == 130
    assert lines == [f"{Path(script).name}: interrupted"]


def test_a_package_that_is_not_installed_is_named_with_the_remedy():
    command = [sys.executable, "-S", str(ROOT / "evaluate.py"), "weights/cnn.pt"]  # -S: without site-packages
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    assert_one_line(done.stderr, "evaluate.py: error: these packages are missing: torch, ", "pip install -r")


# Words ----------------------------------------------------------------------------------------------------------------
def test_a_run_and_its_resumption_have_the_threads_that_were_asked_for(monkeypatch, tmp_path):
    given = []
    monkeypatch.setattr(torch, "set_num_threads", given.append)
    train(*MLP, "--dry-run", "--threads", 3, "--output-dir", tmp_path / "run")
    train("--resume", tmp_path / "run")
    assert given == [3, 3]


def test_what_a_recipe_sets_for_a_dataset_beats_what_it_sets_for_a_model():
    parser, words = train_likelihood.get_args_parser(), [*DIGITS, "--model", "rnn"]
    args = flags.parse_args(parser, train_likelihood.RECIPES, train_likelihood.VARIANTS, words)
    assert (args.epochs, args.lr) == (100, 0.012)


@pytest.mark.parametrize(("words", "value"), [("--black -5e-1", -0.5), ("--black -1E0", -1), ("--black=-.5", -0.5)])
def test_a_negative_number_is_a_value(words, value):
    assert parse(words.split()).black == value


def test_a_whole_number_in_a_recipe_stands_for_a_decimal_one(monkeypatch):
    monkeypatch.setitem(train_classifier.RECIPES["lecture"], "weight_decay", 0)
    train(*MLP, "--dry-run", "--output-dir", "run")
    train("--resume", "run")


@pytest.mark.parametrize("name", ["SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE", "WORLD_SIZE"])
def test_tasks_that_each_train_a_run_of_their_own_are_told_so(name, monkeypatch, capsys):
    monkeypatch.setenv(name, "2")
    flags.start(train_classifier.get_args_parser(), train_classifier.RECIPES, None, [])
    assert_one_line(capsys.readouterr().err, f"warning: {name}=2: each task trains a run of its own", "torchrun")
    monkeypatch.setenv(name, "1")
    flags.start(train_classifier.get_args_parser(), train_classifier.RECIPES, None, [])
    assert not capsys.readouterr().err


@pytest.mark.parametrize(
    ("script", "words", "parts"),
    [
        (train_classifier, ["--batch-size", "0"], ["--batch-size", "whole number from 1"]),
        (train_classifier, ["--lr", "nan"], ["--lr"]),
        (train_classifier, ["--lr", "-inf"], ["must be a number of at least 0, not -inf"]),
        (train_classifier, ["--local-rank=0"], ["use torchrun, not torch.distr"]),
        *((train_classifier, ["--device", name], [f"must be auto, cpu, cuda, cuda:1, ... or mps, not {name}"])
          for name in ("gpu", "cuda:x", "cpu:0")),
        (train_classifier, [*DIGITS, "--auto-resume"], ["--auto-resume", "--output-dir"]),
        (train_classifier, [*DIGITS, "--schedule", "maxout"], ["--schedule maxout", "--optimizer sgd"]),
        (train_classifier, [*DIGITS, "--momentum", "0.9"], ["--momentum has no effect without --optimizer sgd"]),
        (train_classifier, [*DIGITS, "--recipe", "paper", "--eps", "1"], ["--eps", "without --optimizer adam"]),
        (train_classifier, [*DIGITS, "--elastic", "2"], ["--elastic has no effect without --augment"]),
        (train_classifier, [*DIGITS, "--patience", "3"], ["--patience", "--val-size"]),
        (train_classifier, [*DIGITS, "--model", "maxout", "--batch-norm"], ["maxout", "--batch-norm"]),
        (train_likelihood, [*DIGITS, "--model", "hmm", "--hidden", "5"], ["hmm", "--hidden"]),
    ],
)  # fmt: skip
def test_bad_flags_get_one_line_and_leave_nothing(tmp_path, capsys, script, words, parts):
    with pytest.raises((UserError, OSError, SystemExit)) as caught:
        script.main(words)
    error = caught.value
    assert_one_line(capsys.readouterr().err if isinstance(error, SystemExit) else f"{error}\n", *parts)
    assert list(tmp_path.iterdir()) == []


def test_a_process_says_it_in_one_line_too_and_exits_with_a_status(tmp_path):
    for command, code, said in (
        (["train_gan.py", "--batchsize", "8"], 2, ["train_gan.py: error: ", "--batchsize", "mean --batch-size?"]),
        (["train_gan.py", "--resume", "nowhere"], 1, ["train_gan.py: error: ", "nowhere", "this is not a run"]),
        (["utils.py"], 1, ["run a script instead: python train_classifier.py"]),
    ):
        assert_one_line(run(*command, cwd=tmp_path, code=code)[1], *said)
