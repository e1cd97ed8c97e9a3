//! For which Slurm a plugin file was built, read from the file: it is not loaded.

use std::path::Path;

use object::{Object, ObjectSection, ObjectSymbol};

/// Larger files are no plugin, in bytes. A debug build has about 40 MB.
const MAX_FILE: u64 = 256 << 20;

/// Year and month of a Slurm release, as in 24.11.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Release(pub u32, pub u32);

impl std::fmt::Display for Release {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:02}.{:02}", self.0, self.1)
    }
}

impl Release {
    /// From what `scontrol --version` prints: `slurm 24.11.7`, `slurm-wlm 22.05.8`.
    pub fn parse(text: &str) -> Option<Self> {
        let word = text
            .split_whitespace()
            .find(|w| w.starts_with(|c: char| c.is_ascii_digit()))?;
        let mut numbers = word.split(|c: char| !c.is_ascii_digit());
        Some(Self(
            numbers.next()?.parse().ok()?,
            numbers.next()?.parse().ok()?,
        ))
    }
}

/// The symbol `plugin_version` of an ELF file: `SLURM_VERSION_NUMBER`, of which Slurm compares year and month.
pub fn built_for(path: &Path) -> Result<Release, String> {
    let facts = std::fs::metadata(path).map_err(|e| e.to_string())?;
    if facts.len() > MAX_FILE {
        return Err("it is too large for a plugin".into());
    }
    let bytes = std::fs::read(path).map_err(|e| e.to_string())?;
    let file = object::File::parse(&*bytes).map_err(|_| "it is not an ELF file")?;
    let symbol = (file.dynamic_symbols())
        .find(|s| s.name() == Ok("plugin_version"))
        .ok_or("it is not a Slurm plugin")?;
    let section = symbol
        .section_index()
        .and_then(|i| file.section_by_index(i).ok());
    let data = section.and_then(|s| s.data_range(symbol.address(), 4).ok().flatten());
    let data: [u8; 4] = data
        .and_then(|d| d.try_into().ok())
        .ok_or("its version cannot be read")?;
    let number = match file.is_little_endian() {
        true => u32::from_le_bytes(data),
        false => u32::from_be_bytes(data),
    };
    Ok(Release(number >> 16 & 0xff, number >> 8 & 0xff))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn releases_of_every_packaging_read() {
        assert_eq!(Release::parse("slurm-wlm 22.05.8\n"), Some(Release(22, 5)));
        assert_eq!(Release::parse("slurm 24.11.7"), Some(Release(24, 11)));
        assert_eq!(
            Release::parse("slurm 26.05.0-0rc1")
                .map(|r| r.to_string())
                .as_deref(),
            Some("26.05")
        );
        assert_eq!(Release::parse("command not found"), None);
    }

    #[test]
    fn other_files_are_told_as_such() {
        let here = std::env::current_exe().unwrap();
        assert_eq!(built_for(&here), Err("it is not a Slurm plugin".into()));
        assert_eq!(
            built_for(Path::new("/proc/self/maps")),
            Err("it is not an ELF file".into())
        );
    }
}
