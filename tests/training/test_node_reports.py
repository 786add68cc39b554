"""Which node is fit, from what srun and pdsh print."""

from wsm_ds.training.node_reports import NodeReport, reports_from_pdsh, reports_from_srun


def test_srun_labels_lines_with_the_number_of_the_task() -> None:
    hosts = [f"n{task}" for task in range(11)]
    output = " 0: n0: fit: folder writable\n10: n10: fit: 1.0 TiB free\n 1: n1: unfit: clock\n02: n2: fit: all\n"
    reports = reports_from_srun(hosts, output)
    assert reports is not None
    assert [report.host for report in reports if report.is_fit] == ["n0", "n2", "n10"]
    assert reports[1] == NodeReport("n1", False, "n1: unfit: clock")
    assert reports[3] == NodeReport("n3", False, "")


def test_all_lines_of_a_task_are_its_answer() -> None:
    output = "1: mkdir: cannot create directory\n0: n0: fit: all\n1: n1: unfit: /scratch cannot be made\n"
    reports = reports_from_srun(["n0", "n1"], output)
    assert reports is not None
    assert reports[1].answer == "mkdir: cannot create directory\nn1: unfit: /scratch cannot be made"


def test_without_a_labelled_line_srun_did_not_start_the_check() -> None:
    assert reports_from_srun(["n0"], "srun: error: Unable to create step for job 7\n") is None
    assert reports_from_srun(["n0"], "") is None


def test_pdsh_labels_lines_with_the_host() -> None:
    output = "n1: n1: fit: folder writable\npdsh@head: n2: ssh exited with exit code 255\n"
    assert reports_from_pdsh(["n1", "n2", "n3"], output) == [
        NodeReport("n1", True, "n1: n1: fit: folder writable"),
        NodeReport("n2", False, "pdsh@head: n2: ssh exited with exit code 255"),
        NodeReport("n3", False, ""),
    ]


def test_a_host_whose_name_begins_like_another_is_not_mistaken_for_it() -> None:
    reports = reports_from_pdsh(["n1", "n1.site"], "n1.site: n1.site: fit: folder writable\n")
    assert [report.is_fit for report in reports] == [False, True]
