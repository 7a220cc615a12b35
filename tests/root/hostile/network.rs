//! Packages that download.

use super::lab::{Deb, HostileLab};
use std::io::Write;
use std::net::TcpListener;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

/// A server on this machine's loopback, which counts its visitors. It ends with the test's process.
fn server() -> (u16, Arc<AtomicUsize>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let (port, visits) = (listener.local_addr().unwrap().port(), Arc::new(AtomicUsize::new(0)));
    let count = visits.clone();
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            count.fetch_add(1, Ordering::SeqCst);
            stream.unwrap().write_all(b"token\n").unwrap();
        }
    });
    (port, visits)
}

fn download(port: u16) -> String {
    format!(
        "perl -MIO::Socket::INET -e '$s = IO::Socket::INET->new(\"127.0.0.1:{port}\") or die \"cannot connect: $!\\n\"; \
         print <$s>' > /token\ncp /etc/resolv.conf /seen\n"
    )
}

#[test]
fn a_package_reads_from_the_network_only_if_the_definition_says_so() {
    let lab = HostileLab::new();
    let (port, visits) = server();
    let deb = || Deb::sh(&download(port));
    lab.define(&[deb()], "");
    lab.fails(5, &["the package `hostile`", "cannot connect", "`network = true`"]);
    assert_eq!(visits.load(Ordering::SeqCst), 0);

    // A key of the top, so it comes before the tables.
    lab.define(&[deb()], "network = true");
    let (disk, _) = lab.image();
    assert_eq!(visits.load(Ordering::SeqCst), 1);
    assert_eq!(disk.read("/token").as_deref(), Some("token\n"));
    // It saw this machine's, and the image kept its own.
    assert_eq!(disk.read("/seen"), std::fs::read_to_string("/etc/resolv.conf").ok());
    assert_eq!(disk.read("/etc/resolv.conf"), lab.base().read("/etc/resolv.conf"));
    assert!(disk.read("/etc/resolv.conf").unwrap().contains("The base image's own"));
}

#[test]
fn a_script_reads_from_the_network_only_if_its_table_says_so() {
    let lab = HostileLab::new();
    let (port, visits) = server();
    lab.world.write("image/get.sh", &format!("#!/bin/sh -e\n{}", download(port)));
    lab.world.write(
        "image/name.sh",
        "#!/bin/sh -e\nperl -MSocket=getaddrinfo -e '($e) = getaddrinfo(\"deb.debian.org\", 80); die \"$e\\n\" if $e'\n",
    );
    // A documentation's address: without a network there is no way to it.
    lab.world.write(
        "image/address.sh",
        "#!/bin/sh -e\nperl -MIO::Socket::INET -e 'IO::Socket::INET->new(\"192.0.2.1:80\") or die \"$!\\n\"'\n",
    );
    for (script, hint) in
        [("get.sh", ""), ("name.sh", "`network = true`"), ("address.sh", "`network = true`")]
    {
        lab.define(&[], &format!("[[run]]\nscript = \"{script}\""));
        lab.fails(5, &[script, hint, "[[run]]"]);
    }
    // That of the packages is not that of the scripts.
    lab.define(&[], "network = true\n[[run]]\nscript = \"get.sh\"");
    lab.fails(5, &["get.sh"]);
    assert_eq!(visits.load(Ordering::SeqCst), 0);
    lab.define(&[], "[[run]]\nscript = \"get.sh\"\nnetwork = true");
    let (disk, _) = lab.image();
    assert_eq!(disk.read("/token").as_deref(), Some("token\n"));
    assert_eq!(disk.read("/etc/resolv.conf"), lab.base().read("/etc/resolv.conf"));
}
