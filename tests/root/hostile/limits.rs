//! Scripts that need what no step has: the hint of the failure says it.

use super::lab::HostileLab;

#[test]
fn a_program_that_meets_a_limit_of_a_step_gets_a_hint() {
    let lab = HostileLab::new();
    for (command, words) in [
        // The small image has neither mount nor chattr nor sudo: these are their messages.
        ("echo 'mount: /mnt: permission denied.'; exit 32", "can neither mount file systems"),
        ("unshare --mount true", "can neither mount file systems nor create namespaces"),
        (
            "echo 'chattr: Operation not permitted while setting flags on /opt/x'; exit 1",
            "cannot set the attributes `i` and `a`",
        ),
        (
            "perl -e 'for (1..70000) { open($f[$_], \"<\", \"/dev/null\") or die \"$!\\n\" }'",
            "can have 65536 files open",
        ),
        ("echo 'sudo: The \"no new privileges\" flag is set'; exit 1", "sudo does not work"),
        // A program that says nothing may have tried to reach the network.
        ("exit 3", "It printed nothing. It runs without the network"),
        ("echo failed; exit 3", "failed"),
    ] {
        lab.world.write("image/run.sh", &format!("#!/bin/sh\nexport LC_ALL=C\n{command}\n"));
        lab.define(&[], "[[run]]\nscript = \"run.sh\"");
        let baked = lab.fails(5, &[words]);
        let quiet = baked.err.contains("It printed nothing");
        assert_eq!(quiet, command == "exit 3", "{command}: {}", baked.err);
    }
}
