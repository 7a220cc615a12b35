//! What a package may leave, and what is in the image then: rights, configuration files, its own policy.

use super::lab::{Deb, HostileLab, changed, variable};
use oven_testing::ImageReader;

#[test]
fn setuid_files_and_capabilities_stay() {
    let lab = HostileLab::new();
    // VFS_CAP_REVISION_2, effective; CAP_NET_RAW permitted (<linux/capability.h>).
    let setxattr = format!(
        "perl -e 'sub set {{ syscall({}, @_, 0) == 0 or die $! }} ($f, $c, $u, $b) = \
         (\"/opt/ping\", \"security.capability\", \"user.colour\", \"blue\"); \
         $v = pack(\"V5\", 0x02000001, 0x2000, 0, 0, 0); set($f, $c, $v, 20); set($f, $u, $b, 4)'",
        libc::SYS_setxattr
    );
    let postinst = format!(
        "cp /bin/true /opt/su; chown root:mail /opt/su; chmod 6755 /opt/su\n\
         mkdir /opt/spool; chown root:mail /opt/spool; chmod 3777 /opt/spool\n\
         cp /bin/true /opt/ping; {setxattr}\nln /opt/su /opt/su2\nmkfifo -m 600 /opt/fifo\n"
    );
    let deb = Deb::sh(&postinst).file("/opt/shipped", "#!/bin/sh\n", 0o4755);
    lab.world.write("image/f", "x");
    lab.define(
        &[deb],
        "[[file]]\nsource = \"f\"\ntarget = \"/opt/placed\"\nmode = \"4711\"\ngroup = \"mail\"",
    );
    let (disk, _) = lab.image();
    for (path, mode) in [
        ("/opt/su", "06755"),
        ("/opt/su2", "06755"),
        ("/opt/spool", "03777"),
        ("/opt/ping", "0755"),
        ("/opt/shipped", "04755"),
        ("/opt/placed", "04711"),
        ("/opt/fifo", "0600"),
        ("/usr/bin/su", "04755"),
    ] {
        assert_eq!(disk.mode(path).as_deref(), Some(mode), "{path}");
    }
    let attributes = disk.debugfs("ea_list /opt/ping").0;
    assert!(attributes.contains("security.capability (20) = 01 00 00 02 00 20 00 00"), "{attributes}");
    assert!(attributes.contains("user.colour (4) = \"blue\""), "{attributes}");
}

#[test]
fn a_package_may_ship_its_own_policy() {
    let lab = HostileLab::new();
    let own = "#!/bin/sh\nexit 104\n";
    let package = || Deb::new("hostile").file("/usr/sbin/policy-rc.d", own, 0o755);
    lab.define(&[package()], "");
    let (disk, _) = lab.image();
    assert_eq!(disk.read("/usr/sbin/policy-rc.d").as_deref(), Some(own));
    assert_eq!(disk.mode("/usr/sbin/policy-rc.d").as_deref(), Some("0755"));
    // As alternatives do, and as a script does that does not want any.
    let script = "ln -sf /usr/share/hostile/file /usr/sbin/policy-rc.d";
    lab.define(&[Deb::sh(script)], "");
    let (disk, _) = lab.image();
    assert_eq!(disk.link("/usr/sbin/policy-rc.d").as_deref(), Some("/usr/share/hostile/file"));
    // By an alternative, which replaces nothing but links.
    let script = "update-alternatives --install /usr/sbin/policy-rc.d policy-rc.d /usr/share/hostile/file 1";
    lab.define(&[Deb::sh(script)], "");
    let (disk, _) = lab.image();
    assert_eq!(disk.link("/usr/sbin/policy-rc.d").as_deref(), Some("/etc/alternatives/policy-rc.d"));
    // Written in place.
    lab.define(&[Deb::sh("echo own > /usr/sbin/policy-rc.d; chmod 700 /usr/sbin/policy-rc.d")], "");
    let (disk, _) = lab.image();
    assert_eq!(disk.read("/usr/sbin/policy-rc.d").as_deref(), Some("own\n"));
    assert_eq!(disk.mode("/usr/sbin/policy-rc.d").as_deref(), Some("0700"));
    // As scripts do that bring their own protection from services.
    for script in [
        "printf '#!/bin/sh\\nexit 101\\n' > /usr/sbin/policy-rc.d; chmod +x /usr/sbin/policy-rc.d; rm -f /usr/sbin/policy-rc.d",
        "dpkg-divert --local --rename --add /usr/sbin/policy-rc.d; ln -s /bin/true /usr/sbin/policy-rc.d; \
         rm /usr/sbin/policy-rc.d; dpkg-divert --local --rename --remove /usr/sbin/policy-rc.d",
        "dpkg-divert --local --rename --add /usr/sbin/policy-rc.d",
    ] {
        lab.define(&[Deb::sh(script)], "");
        let (disk, _) = lab.image();
        let left: Vec<_> = disk
            .list("/usr/sbin")
            .into_iter()
            .filter(|n| n.contains("policy") || n.starts_with('.'))
            .collect();
        assert_eq!(left, [""; 0], "{script}");
    }
}

#[test]
fn a_configuration_file_that_was_changed_stays_or_is_replaced() {
    let lab = HostileLab::new();
    let deb = |version: u32| {
        Deb::new("app")
            .version(version)
            .script("conffiles", "/etc/app.conf\n/etc/app.d/plain\n")
            .file("/etc/app.conf", &format!("shipped {version}\n"), 0o644)
            .file("/etc/app.d/plain", &format!("shipped {version}\n"), 0o644)
    };
    let base = deb(1).build(&lab.world.path("image"));
    lab.world.write("image/changed", "changed\n");
    lab.world.write(
        "image/image.toml",
        &format!(
            "from = {{ name = \"base\" }}\npackages = [\"./{base}\"]\n\
             [[file]]\nsource = \"changed\"\ntarget = \"/etc/app.conf\"\n"
        ),
    );
    for (policy, left) in [
        ("", "changed\n"),
        ("conffiles = \"keep\"\n", "changed\n"),
        ("conffiles = \"replace\"\n", "shipped 2\n"),
    ] {
        std::fs::create_dir_all(lab.world.path("child")).unwrap();
        let file = deb(2).build(&lab.world.path("child"));
        lab.world
            .write("child/image.toml", &format!("from = \"../image\"\npackages = [\"./{file}\"]\n{policy}"));
        let (out, err) = lab.world.expect(0, &["bake", "child"]);
        let disk = ImageReader::of(&lab.world, out.trim());
        assert_eq!(disk.read("/etc/app.conf").as_deref(), Some(left), "{policy}{err}");
        assert_eq!(disk.read("/etc/app.d/plain").as_deref(), Some("shipped 2\n"), "nobody changed it");
        assert_eq!(disk.audit(), "");
    }
    lab.world.assert_no_traces("configuration files");
}

#[test]
fn a_base_with_a_broken_package_is_refused_by_name() {
    let tiny = variable("OVEN_TEST_TINY");
    let status = ImageReader::in_file(&tiny).read("/var/lib/dpkg/status").unwrap();
    let at = status.find("Package: hostname\n").unwrap();
    let broken = status[..at].to_owned()
        + &status[at..].replacen("Status: install ok installed", "Status: install ok half-configured", 1);
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(&file, broken).unwrap();
    let requests = [
        "rm /etc/apt/sources.list".to_owned(),
        "rm /var/lib/dpkg/status".to_owned(),
        format!("write {} /var/lib/dpkg/status", file.path().display()),
    ];
    let lab = HostileLab::on(&changed(&tiny, "broken", &requests.each_ref().map(String::as_str)));
    lab.define(&[Deb::new("innocent")], "");
    lab.fails(3, &["base image", "`hostname` is half-configured"]);
    lab.define(&[], "");
    lab.fails(3, &["base image", "`hostname` is half-configured"]);
    // A script may mend it.
    lab.world.write("image/mend.sh", "#!/bin/sh\nexec dpkg --configure -a\n");
    lab.define(&[], "[[run]]\nscript = \"mend.sh\"");
    let (disk, _) = lab.image();
    assert_eq!(disk.audit(), "");
}
