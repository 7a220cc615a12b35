//! Reads how far a step is from the lines that its program writes. The plugin describes these lines.

use super::diagnose::fill;
use crate::report::{Amount, Progress};
use crate::text::match_wildcards;
use oven_distro::ProgressLine;

/// The progress of a running step.
pub struct ProgressReader<'a> {
    lines: Vec<&'a ProgressLine>,
    progress: Progress,
    /// The sums of what the lines counted.
    items: Counted,
    bytes: Counted,
}

#[derive(Default)]
struct Counted {
    done: Option<u64>,
    of: Option<u64>,
}

impl Counted {
    fn set(&mut self, done: Option<u64>, of: Option<u64>, adds: bool) {
        if let Some(done) = done {
            self.done = Some(if adds { self.done.unwrap_or(0).saturating_add(done) } else { done });
        }
        // Some programs print a total of 0 if there is nothing to do.
        self.of = of.filter(|of| *of > 0).or(self.of);
    }

    fn amount(&self) -> Option<Amount> {
        (self.done.is_some() || self.of.is_some())
            .then(|| Amount { done: self.done.unwrap_or(0), of: self.of })
    }
}

impl<'a> ProgressReader<'a> {
    pub fn new(lines: Vec<&'a ProgressLine>) -> Self {
        Self { lines, progress: Progress::default(), items: Counted::default(), bytes: Counted::default() }
    }

    /// Reads a line of the program. Returns the progress if the line changed it.
    pub fn line(&mut self, line: &str) -> Option<Progress> {
        let line = line.trim_end();
        let (rule, found) =
            self.lines.iter().find_map(|rule| Some((*rule, match_wildcards(&rule.output, line)?)))?;
        let found: Vec<_> = found.into_iter().map(str::to_owned).collect();
        let text = |template: &Option<String>| template.as_ref().map(|text| fill(text, &found));
        let adds = |template: &Option<String>| template.as_ref().is_some_and(|text| text.starts_with('+'));
        let number = |template| text(template).and_then(|text| size(text.trim_start_matches('+')));
        self.items.set(number(&rule.done), number(&rule.total), adds(&rule.done));
        self.bytes.set(number(&rule.bytes), number(&rule.total_bytes), adds(&rule.bytes));
        if let Some(unit) = &rule.unit {
            self.progress.unit.clone_from(unit);
        }
        if let Some(name) = text(&rule.name) {
            name.trim().clone_into(&mut self.progress.name);
        }
        if let Some(percent) = text(&rule.percent).and_then(|text| text.trim().parse::<f64>().ok()) {
            self.set_percent(percent.clamp(0.0, 100.0));
        }
        if self.bytes.of.is_some() {
            self.progress.percent = None; // of an earlier line, before the total was known
        }
        self.progress.items = self.items.amount();
        self.progress.bytes = self.bytes.amount();
        Some(self.progress.clone())
    }

    /// A percentage is a number of bytes if the total is known.
    fn set_percent(&mut self, percent: f64) {
        match self.bytes.of {
            Some(of) => self.bytes.done = Some((of as f64 * percent / 100.0) as u64),
            None => self.progress.percent = Some(percent as u64),
        }
    }
}

/// Parses a number at the begin of a text, with an optional unit of bytes: `12`, `88.1 MB`, `300 KiB`, `143 M`.
fn size(text: &str) -> Option<u64> {
    let text = text.trim_start();
    let end = text.find(|c: char| !c.is_ascii_digit() && !".,".contains(c)).unwrap_or(text.len());
    let (number, rest) = text.split_at(end);
    let number: f64 = number.replace(',', "").parse().ok()?;
    let unit: String = rest.trim_start().chars().take_while(char::is_ascii_alphabetic).collect();
    // apt counts in thousands and writes `kB`. The others count in 1024 and write `KiB`, `k` or `M`.
    let factor: f64 = match unit.as_str() {
        "kB" | "KB" => 1e3,
        "MB" => 1e6,
        "GB" => 1e9,
        "K" | "k" | "KiB" => 1024.0,
        "M" | "MiB" => 1024.0 * 1024.0,
        "G" | "GiB" => 1024.0 * 1024.0 * 1024.0,
        _ => 1.0,
    };
    let bytes = number * factor;
    (bytes >= 0.0 && bytes <= u64::MAX as f64).then_some(bytes as u64)
}

#[cfg(test)]
mod tests {
    use super::*;
    use oven_distro::{Distro, Job, OsRelease, Package, Phase};

    fn rule(output: &str, fields: &[(&str, &str)]) -> ProgressLine {
        let field =
            |name: &str| fields.iter().find(|(n, _)| *n == name).map(|(_, value)| (*value).to_owned());
        ProgressLine {
            output: output.into(),
            phases: Vec::new(),
            done: field("done"),
            total: field("total"),
            unit: field("unit"),
            bytes: field("bytes"),
            total_bytes: field("total_bytes"),
            percent: field("percent"),
            name: field("name"),
        }
    }

    fn last(rules: &[ProgressLine], lines: &[&str]) -> Progress {
        let mut reader = ProgressReader::new(rules.iter().collect());
        lines.iter().filter_map(|line| reader.line(line)).last().unwrap_or_default()
    }

    #[test]
    fn a_percentage_of_a_known_total_is_a_number_of_bytes() {
        let rules = [
            rule("Need to get * of archives.", &[("total_bytes", "{1}")]),
            rule(
                "dl:*:*:* of *",
                &[("percent", "{2}"), ("done", "{3}"), ("total", "{4}"), ("unit", "packages")],
            ),
            rule("Get:* *", &[("name", "{2}")]),
        ];
        let lines =
            ["Need to get 143 MB of archives.", "Get:41 libc6", "dl:41:50.5:41 of 64 (38s left)", "other"];
        let progress = last(&rules, &lines);
        assert_eq!(progress.items, Some(Amount { done: 41, of: Some(64) }));
        assert_eq!(progress.bytes, Some(Amount { done: 72_215_000, of: Some(143_000_000) }));
        assert_eq!((progress.name.as_str(), progress.unit.as_str()), ("libc6", "packages"));
        assert_eq!(progress.percent, None);
        assert_eq!(last(&rules[1..], &lines).percent, Some(50), "the total is not known");
        let late = ["dl:1:0:1 of 1 (1s left)", lines[0], lines[1]];
        assert_eq!(last(&rules, &late).percent, None, "the total was not known at first");
        assert_eq!(last(&rules, &["Need to get 0 B of archives."]).bytes, None);
    }

    /// Returns the progress after these lines of a step, with the plugin's rules.
    fn of_plugin(distro: &dyn Distro, os: &str, phase: Phase, lines: &[&str]) -> Progress {
        let os_release = OsRelease::parse(os);
        let look_for = distro.claims(&os_release).look_for;
        let present = look_for.into_iter().map(|path| (path, true)).collect();
        let packages = vec![Package::Named { name: "curl".into(), version: None, suite: None }];
        let job = Job { os_release, architecture: "x86_64".into(), present, packages, ..Job::default() };
        let plan = distro.plan(&job).unwrap();
        let rules =
            plan.progress.iter().filter(|line| line.phases.is_empty() || line.phases.contains(&phase));
        let mut reader = ProgressReader::new(rules.collect());
        lines.iter().filter_map(|line| reader.line(line)).last().unwrap_or_default()
    }

    #[test]
    fn lines_of_apt() {
        let of = |phase, lines: &[&str]| {
            of_plugin(&oven_debian::Debian, "ID=debian\nVERSION_ID=12\n", phase, lines)
        };
        let progress = of(
            Phase::Fetch,
            &[
                "Need to get 88.1 MB of archives.",
                "Get:1 http://deb.debian.org/debian bookworm/main amd64 libssl3 amd64 3.0.11-1~deb12u2 [2,019 kB]",
                "dlstatus:1:0:Retrieving file 1 of 65",
                "Get:41 http://deb.debian.org/debian bookworm/main amd64 curl amd64 7.88.1-10 [315 kB]",
                "dlstatus:41:60.3:Retrieving file 41 of 65 (38s remaining)",
            ],
        );
        assert_eq!(progress.items, Some(Amount { done: 41, of: Some(65) }));
        assert_eq!(progress.bytes, Some(Amount { done: 53_124_300, of: Some(88_100_000) }));
        assert_eq!((progress.name.as_str(), progress.unit.as_str()), ("curl", "packages"));
        let index = "Get:4 http://deb.debian.org/debian bookworm/main amd64 Packages [8,787 kB]";
        let progress = of(Phase::Fetch, &["dlstatus:4:25:Retrieving file 4 of 5", index]);
        assert_eq!(progress.name, "bookworm/main amd64 Packages");
        let lines = ["pmstatus:dpkg-exec:0:Running dpkg", "pmstatus:curl:66.6667:Installing curl (amd64)"];
        assert_eq!(of(Phase::Install, &lines).percent, Some(66));
        assert_eq!(of(Phase::Install, &["dlstatus:1:20:Retrieving file 1 of 1"]), Progress::default());
        let unpack = ["unpack:3 packages", "unpacked:curl", "unpacked:libssl3"];
        assert_eq!(of(Phase::Fetch, &unpack).items, Some(Amount { done: 2, of: Some(3) }));
    }

    #[test]
    fn lines_of_dnf_and_yum() {
        let of = |phase, lines: &[&str]| {
            of_plugin(&oven_redhat::RedHat, "ID=fedora\nVERSION_ID=41\n", phase, lines)
        };
        for (total, file, bytes) in [
            (
                "Total download size: 143 M",
                "(12/64): curl-7.76.1-29.el9.x86_64.rpm   1.2 MB/s | 300 kB     00:00    ",
                300_000,
            ),
            (
                "Total download size: 143 M",
                "(12/64): curl-7.29.0-59.el7.x86_64.rpm            | 271 kB  00:00:00     ",
                271_000,
            ),
            (
                "Total size of inbound packages is 143 MiB. Need to download 143 MiB.",
                "[12/64] curl-7.0:8.6.0-8.fc40.x86_64 100% |   3.9 MiB/s | 309 KiB |  00m00s",
                309 << 10,
            ),
        ] {
            let progress = of(Phase::Fetch, &[total, file]);
            assert_eq!(progress.items, Some(Amount { done: 12, of: Some(64) }), "{file}");
            assert_eq!(progress.bytes, Some(Amount { done: bytes, of: Some(143 << 20) }), "{file}");
            assert!(progress.name.starts_with("curl-7."), "{progress:?}");
        }
        for line in [
            "  Installing       : curl-7.76.1-29.el9.x86_64       3/14 ",
            "[ 3/14] Installing curl-0:8.6.0 100% |  12.9 MiB/s | 1.0 MiB |  00m00s",
        ] {
            let progress = of(Phase::Install, &[line]);
            assert_eq!(progress.items, Some(Amount { done: 3, of: Some(14) }), "{line}");
            assert!(progress.name.starts_with("curl-"), "{progress:?}");
        }
    }

    #[test]
    fn lines_of_zypper() {
        let of = |phase, lines: &[&str]| {
            of_plugin(&oven_suse::Suse, "ID=opensuse-leap\nVERSION_ID=15.6\n", phase, lines)
        };
        let total = "Overall download size: 143.0 MiB. Already cached: 0 B. After the operation, additional 20 MiB will be used.";
        for file in [
            "Retrieving: curl-8.6.0-1.1.x86_64 (Main Repository) (12/64), 300.0 KiB",
            "Retrieving package curl-8.6.0-1.1.x86_64 (12/64), 300.0 KiB (  1.2 MiB unpacked)",
        ] {
            let progress = of(Phase::Fetch, &[total, file]);
            assert_eq!(progress.items, Some(Amount { done: 12, of: Some(64) }), "{file}");
            assert_eq!(progress.bytes, Some(Amount { done: 300 << 10, of: Some(143 << 20) }), "{file}");
            assert_eq!(progress.name, "curl-8.6.0-1.1.x86_64");
        }
        let progress = of(Phase::Install, &["(3/14) Installing: curl-8.6.0-1.1.x86_64 [...done]"]);
        assert_eq!(
            (progress.items, progress.name.as_str()),
            (Some(Amount { done: 3, of: Some(14) }), "curl-8.6.0-1.1.x86_64")
        );
    }

    #[test]
    fn lines_can_count() {
        let rules = [rule("Got * *", &[("done", "+1"), ("bytes", "+{2}"), ("name", "{1}")])];
        let progress = last(&rules, &["Got a 300 k", "Got b  1.5 MiB", "Got c nothing"]);
        assert_eq!(progress.items, Some(Amount { done: 3, of: None }));
        assert_eq!(progress.bytes, Some(Amount { done: 300 * 1024 + 1024 * 1536, of: None }));
        assert_eq!(progress.name, "c");
    }

    #[test]
    fn hostile_numbers_do_no_harm() {
        let rules =
            [rule("*/* *", &[("done", "{1}"), ("total", "{2}"), ("bytes", "+{3}"), ("percent", "{3}")])];
        for line in ["9e99/-1 nan", "99999999999999999999999/1 inf", "/ .", "٣/٤ ٥", "1/0 1,,,.0.0 GB"] {
            _ = last(&rules, &[line, line, line]);
        }
        let huge = last(&rules, &["1/2 18446744073709551615", "1/2 18446744073709551615"]);
        assert_eq!(huge.bytes, Some(Amount { done: u64::MAX, of: None }));
    }

    #[test]
    fn sizes_as_package_managers_spell_them() {
        for (text, bytes) in [
            ("12", Some(12)),
            ("12.3 MB/143 MB", Some(12_300_000)),
            ("1,234 kB", Some(1_234_000)),
            ("  55 kB     00:00", Some(55_000)),
            ("143 M", Some(143 << 20)),
            ("1.5 GiB", Some(3 << 29)),
            ("64 (38s remaining)", Some(64)),
            ("none", None),
            ("", None),
        ] {
            assert_eq!(size(text), bytes, "{text:?}");
        }
    }
}
