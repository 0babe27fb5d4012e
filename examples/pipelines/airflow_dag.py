"""Clips a store as an Airflow task: what was refused fails at once, what passes is tried again.

airflow dags test clip_gradients --conf '{"source": "x.zarr", "target": "y.zarr"}'
"""

from datetime import timedelta

from airflow.sdk import dag, get_current_context, task
from airflow.sdk.exceptions import AirflowFailException


@task(retries=3, retry_delay=timedelta(seconds=1))
def clip():
    from daskclip import clip_zarr
    from daskclip.errors import DaskClipError, TemporaryError

    conf = get_current_context()["dag_run"].conf
    try:
        report = clip_zarr(conf["source"], conf["target"], float(conf.get("clip_norm", 1.0)))
    except TemporaryError:
        raise  # exit code 75 in the shell: the next try resumes
    except DaskClipError as error:
        raise AirflowFailException(str(error)) from error
    return {"digest": report.digest, "clipped": report.clipped, "run": report.run}


@dag(dag_id="clip_gradients", schedule=None, catchup=False)
def clip_gradients():
    clip()


clip_gradients()
