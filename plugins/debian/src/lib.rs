//! Debian, Ubuntu and their relatives: apt and dpkg.
