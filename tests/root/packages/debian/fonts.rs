//! fc-cache, without the two seconds that it waits.

use super::lab;

/// Programs that print how they were called.
const CACHE: &str = "#!/bin/sh\necho \"cache $*\" >> /called\n[ \"$1\" != -r ]\n";
const LIST: &str =
    "#!/bin/sh\necho \"list $HOME\" >> /called\necho made > /var/cache/fontconfig/1-le64.cache-8\n";

#[test]
fn caches_of_fonts_are_written_by_who_does_not_wait_unless_they_are_to_be_made_anew() {
    let lab = lab();
    let postinst = "#!/bin/sh\nset -e\nmkdir -p /var/cache/fontconfig\n\
        fc-cache -s -f -v\nfc-cache -s -f -v\nfc-cache -s -v\n\
        fc-cache -s -f -v /usr/share/fonts\nfc-cache -r || echo \"failed with $?\" >> /called\n";
    let files = [("usr/bin/fc-cache", CACHE), ("usr/bin/fc-list", LIST), ("DEBIAN/postinst", postinst)];
    lab.package("fonts", "1.0", "", &files);
    lab.define("packages = [\"./fonts.deb\"]\n");
    lab.bake().facts();
    let called = [
        "list /nonexistent", // there were none
        "cache -s -v",
        "cache -s -f -v", // there is one
        "list /nonexistent",
        "cache -s -v",
        "cache -s -f -v /usr/share/fonts",
        "cache -r",
        "failed with 1",
    ];
    assert_eq!(lab.read("called").lines().collect::<Vec<_>>(), called);
    assert!(!lab.image("run/oven").exists(), "what was put before it is gone");
}
