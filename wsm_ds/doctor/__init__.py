"""What bites a WSM run, found before it does: in a ds_config, or in a run's checkpoints and on its disk.

Each finding rests on DeepSpeed's source or on a run of it, and says how to mend it.

    findings          one finding, and the report of all
    deepspeed_facts   what changed in which version of DeepSpeed
    config_checks     a ds_config
    run_checks        a run's checkpoints and its disk
    examination       reads the files, and runs the checks that fit
"""

from wsm_ds.doctor.examination import examine
from wsm_ds.doctor.findings import Finding, Report

__all__ = ["Finding", "Report", "examine"]
