//! What must never panic, whatever the text: run by the tests and by the fuzz targets.

use halite_profiles::Profile;

/// Reads a profile of any text, and changes every number of one that holds together.
pub fn profile(text: &str) {
    let profile = match Profile::parse("text", text) {
        Ok(profile) => profile,
        Err(error) => {
            let said = error.to_string();
            assert!(!said.chars().any(|c| c.is_control() && c != '\n'), "{said:?}");
            return;
        }
    };
    assert!(profile.peaks().iter().all(|(_, ops_per_s)| ops_per_s.is_finite() && *ops_per_s > 0.0));
    for (path, quantity) in &profile.quantities {
        assert!(profile.with(path, 2.0 * quantity.value).is_ok(), "{path}");
    }
}
