"""A real SLURM of one node on loopback, with its own folders, ports and throw-away key."""

import os
import pwd
import shutil
import socket
import subprocess
import time
from pathlib import Path

from servers import free_port

COMMANDS = ("munged", "slurmctld", "slurmd", "sbatch", "scontrol", "squeue")
CONF = """
ClusterName=clip
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
AuthType=auth/munge
AuthInfo=socket={folder}/munge/munge.socket,cred_expire=5
CryptoType=crypto/munge
SlurmUser=root
SlurmdUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
ReturnToService=2
MpiDefault=none
SlurmctldTimeout=30
SlurmdTimeout=30
KillWait=3
NodeName={host} NodeAddr=127.0.0.1 CPUs=4 RealMemory=8000 State=UNKNOWN
PartitionName=debug Nodes=ALL Default=YES MaxTime=10 State=UP OverSubscribe=NO
SlurmdParameters=config_overrides
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
SchedulerParameters=sched_interval=1,sched_min_interval=0,batch_sched_delay=0,bf_interval=1
"""


def missing():
    """Reason to skip tests of SLURM, or ''."""
    gone = [c for c in COMMANDS if not (shutil.which(c) or Path(f"/usr/sbin/{c}").exists())]
    if gone:
        return f"not installed: {', '.join(gone)}"
    return "" if os.geteuid() == 0 else "SLURM starts as root only"


class Slurm:
    """SLURM daemons, each a child process."""

    def __init__(self, folder):
        self.folder, self.processes = folder, []
        munge, host = folder / "munge", socket.gethostname().partition(".")[0]
        for part in ("state", "spool", "munge"):
            (folder / part).mkdir()
        user = pwd.getpwnam("munge")
        key = munge / "munge.key"
        key.write_bytes(os.urandom(1024))
        for path, mode in ((munge, 0o755), (key, 0o400)):
            os.chown(path, user.pw_uid, user.pw_gid)
            path.chmod(mode)
        for parent in [folder, *folder.parents]:  # munged looks at every folder on the way
            if parent.stat().st_uid == 0 and not parent.stat().st_mode & 0o1000:
                parent.chmod(0o755)
        conf = folder / "slurm.conf"
        conf.write_text(CONF.format(host=host, folder=folder, ports=(free_port(), free_port())))
        self.environment = os.environ | {"SLURM_CONF": str(conf)}
        run_as = ["setpriv", "--reuid=munge", "--regid=munge", "--clear-groups"]
        self.start(
            *run_as, "/usr/sbin/munged", "--foreground", f"--key-file={key}",
            *(f"--{what}-file={munge}/munged.{what}" for what in ("pid", "log", "seed")),
            f"--socket={munge}/munge.socket",
        )  # fmt: skip
        self.until(lambda: (munge / "munge.socket").exists())
        self.start("/usr/sbin/slurmctld", "-D", "-f", conf)
        self.start("/usr/sbin/slurmd", "-D", "-f", conf)
        self.until(lambda: "idle" in self("sinfo", "-h", "-o", "%T"))

    def start(self, *command):
        with (self.folder / f"log{len(self.processes)}").open("w") as log:
            self.processes.append(
                subprocess.Popen(
                    list(map(str, command)), stdout=log, stderr=log, env=self.environment
                )
            )

    def __call__(self, *command):
        """Output of a SLURM command."""
        done = subprocess.run(
            list(map(str, command)),
            capture_output=True,
            text=True,
            check=False,
            env=self.environment,
        )
        return done.stdout.strip() or done.stderr.strip()

    def until(self, condition, seconds=120):
        end = time.monotonic() + seconds
        while not condition():
            logs = "\n".join(p.read_text()[-1500:] for p in self.folder.glob("log*"))
            assert all(p.poll() is None for p in self.processes), logs
            assert time.monotonic() < end, logs
            time.sleep(0.1)

    def submit(self, *command):
        """Submit a job and return its number."""
        said = self("sbatch", "--parsable", *command)
        assert said.isdigit(), said
        return said

    def state(self, job):
        """State of a job, and its number of restarts."""
        said = self("scontrol", "show", "job", job).split()
        fields = dict(field.split("=", 1) for field in said if "=" in field)
        return fields["JobState"], int(fields["Restarts"])

    def close(self):
        self("scancel", "--full", "--user=root")
        end = time.monotonic() + 20
        while self("squeue", "-h") and time.monotonic() < end:
            time.sleep(0.1)
        for process in self.processes[::-1]:
            process.terminate()
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
