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

import train_classifier
from datasets import Batches
from engine import compiler, errors, flags
from engine.checkpoint import write_atomically
from engine.errors import Stopped, UserError, shell
from engine.folder import new_folder
from engine.plots import save_gif, save_grid

pytestmark = pytest.mark.skipif(os.name == "nt", reason="POSIX shells, signals and links")

MLP = [*DIGITS, "--model", "mlp", "--epochs", "2"]
NAMES = ["my runs/first", "-x", "$HOME", "a'b\"c", "`date`", "a\\n\tb", "*", "#1", "é"]


def parse(words):
    return flags.parse_args(train_classifier.get_args_parser(), train_classifier.RECIPES, None, words)


@pytest.fixture(autouse=True)
def in_tmp_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Batches, "rows", Batches.rows)  # restored at the end


# Folders and files ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wanted", "words"),
    [
        (None, r"runs is a link to /scratch/gone, which is missing\); create that"),
        ("runs/mine", "runs is a link to /scratch/gone, which is missing"),
        ("link", "link is a link to elsewhere, which is missing"),
        ("loop", "loop is a link to loop, which is missing"),
        ("file", "file is a file"),
        ("file/mine", "file is a file"),
    ],
)
def test_a_link_that_leads_nowhere_is_named_with_its_target(tmp_path, wanted, words):
    (tmp_path / "runs").symlink_to("/scratch/gone")
    (tmp_path / "link").symlink_to("elsewhere")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "file").touch()
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


@pytest.mark.parametrize("name", ["config.json", ".lock", "checkpoint.pt.mine.tmp"])
def test_a_file_of_theirs_is_not_taken_for_one_of_a_run_that_never_started(tmp_path, name):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / name).write_text('{"options": 5}')
    with pytest.raises(UserError, match=r"--output-dir run is not empty; name a new folder$"):
        train(*MLP, "--output-dir", "run")
    assert (tmp_path / "run" / name).read_text() == '{"options": 5}'


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
    assert parse(["--data-dir=~/data", "--dataset=~/few"]).data_dir == str(tmp_path / "home" / "data")
    with pytest.raises(SystemExit, match="2"):
        parse(["--resume="])  # "$RUN", which is not set: not a new run


def test_the_gif_shows_the_epochs_in_their_order(tmp_path):
    for epoch in (9998, 9999, 10000):
        (tmp_path / "samples").mkdir(exist_ok=True)
        save_grid(torch.full((1, 1, 4, 4), (epoch - 9997) / 4), tmp_path / "samples" / f"epoch-{epoch:04d}.png", 1)
    save_gif(tmp_path)
    from PIL import Image

    gif, shades = Image.open(tmp_path / "samples.gif"), []
    for i in range(3):
        gif.seek(i)
        shades.append(gif.convert("L").getpixel((0, 0)))
    assert shades == sorted(shades)


# Commands -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_a_printed_path_is_one_line_and_reaches_a_program_as_it_is(name):
    line = shell("cat", Path(name))
    assert "\n" not in line
    Path(name).parent.mkdir(exist_ok=True)
    Path(name).write_text("found")
    assert subprocess.run(["sh", "-c", line], capture_output=True, text=True, check=True).stdout == "found"


def signalled(number):
    sys.argv[0] = "repo/train_classifier.py"
    signal.raise_signal(number)


@pytest.mark.parametrize(
    ("number", "name"),
    [(signal.SIGHUP, "-my $runs"), pytest.param(signal.SIGUSR1, "it's", marks=pytest.mark.slow)],
)
def test_the_printed_commands_work_from_where_the_user_stands(tmp_path, number, name):
    """The scripts are called by a relative path from another folder."""
    (tmp_path / "repo").symlink_to(ROOT)
    before = partial(act_at, (0, 3), partial(signalled, number))
    _, errors = run("train_classifier.py", *MLP, f"--output-dir={name}", cwd=tmp_path, code=128 + number, before=before)
    assert_one_line(errors, "resume with: ", " repo/train_classifier.py ")
    line = errors.partition("resume with: ")[2]
    for _ in range(2):  # resume, then evaluate
        done = subprocess.run(["sh", "-c", line], capture_output=True, text=True)
        assert done.returncode == 0, line + done.stderr
        line = done.stdout.partition("now evaluate it: ")[2]
    assert (tmp_path / name / "evaluation" / "metrics.json").is_file()


def test_remedies_can_be_pasted_too(tmp_path):
    train(*MLP, "--schedule", "cosine", "--output-dir", "my run")
    with pytest.raises(UserError, match="not empty; name a new folder, or use --resume 'my run'"):
        train(*MLP, "--output-dir", "my run")
    with pytest.raises(UserError, match="to train longer, start a new run with --start-from 'my run'"):
        train("--resume", "my run", "--epochs", 80)
    import train_gan

    with pytest.raises(UserError, match=r"classifier; resume it with: .*train_classifier\.py --resume 'my run'"):
        train_gan.main(["--resume", "my run"])


# Signals and output ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGXCPU])
def test_a_signal_that_comes_twice_saves_the_last_step(tmp_path, number):
    act_at((0, 3), lambda: [signal.raise_signal(number) for _ in range(2)])
    with pytest.raises(Stopped) as caught:
        train(*MLP, "--output-dir", "run")
    assert caught.value.args[0] == number
    assert load("run/checkpoint.pt")["batch"] == 4


@pytest.mark.parametrize(("torchrun", "epochs"), [(False, 2), (True, 0)])
def test_a_hangup_that_nohup_ignores_stays_ignored(tmp_path, monkeypatch, torchrun, epochs):
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
def test_what_the_terminal_cannot_show_is_escaped(tmp_path, monkeypatch):
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


def test_ctrl_c_while_torch_is_imported_is_one_line(tmp_path):
    command = [sys.executable, "-X", "importtime", str(ROOT / "train_gan.py"), "--help"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    for line in process.stderr:
        if "torch" in line:  # one of its modules has been imported
            process.send_signal(signal.SIGINT)
            break
    lines = [line for line in process.communicate()[1].splitlines() if not line.startswith("import time:")]
    assert process.returncode == 130
    assert lines == ["train_gan.py: interrupted"]


# Words ----------------------------------------------------------------------------------------------------------------


def test_utils_says_that_it_is_no_script():
    done = subprocess.run([sys.executable, str(ROOT / "utils.py")], capture_output=True, text=True)
    assert done.returncode == 1
    assert_one_line(done.stderr, "run a script instead: python train_classifier.py")


@pytest.mark.parametrize(("words", "value"), [("--black -5e-1", -0.5), ("--black -1E0", -1), ("--black=-.5", -0.5)])
def test_a_negative_number_is_a_value(words, value):
    assert parse(words.split()).black == value


@pytest.mark.parametrize(
    ("words", "message"),
    [("--lr -inf", "must be a number of at least 0, not -inf"), ("--local-rank=0", "use torchrun, not torch.distr")],
)
def test_usage_errors_name_the_remedy(words, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        parse(words.split())
    assert_one_line(capsys.readouterr().err, message)


@pytest.mark.parametrize("name", ["SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE", "WORLD_SIZE"])
def test_tasks_that_each_train_a_run_of_their_own_are_told_so(name, monkeypatch, capsys):
    monkeypatch.setenv(name, "2")
    flags.start(train_classifier.get_args_parser(), train_classifier.RECIPES, None, [])
    assert_one_line(capsys.readouterr().err, f"warning: {name}=2: each task trains a run of its own", "torchrun")
    monkeypatch.setenv(name, "1")
    flags.start(train_classifier.get_args_parser(), train_classifier.RECIPES, None, [])
    assert not capsys.readouterr().err


def test_no_remedy_names_a_recipe_that_may_have_been_given():
    from measures.watch import failure_signs

    ones = torch.ones(10, dtype=torch.long)
    assert not any("recipe" in sign for sign in failure_signs({"loss_d": 0.0}, ones, 0 * ones))
