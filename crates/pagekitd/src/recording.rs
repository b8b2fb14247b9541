//! `--record FILE`: the working set that this server writes down.

use std::path::PathBuf;
use std::sync::Arc;

use pagekit::error::Result;
use pagekit::template::Template;
use pagekit::working_set::{Recorder, Until, WorkingSet};

/// A recording, and the file that takes it.
pub struct Recording {
    path: PathBuf,
    /// What the file held before.
    known: Option<WorkingSet>,
    recorder: Arc<Recorder>,
    until: Until,
}

impl Recording {
    /// Begins to record. A file that is there is read first, so that what is wrong with it is said
    /// now and not when there is something to lose.
    pub fn begin(template: &Template, path: PathBuf, until: Until) -> Result<Recording> {
        let known = match path.exists() {
            true => Some(WorkingSet::load(&path)?),
            false => None,
        };
        if let Some(known) = &known {
            known.check(template.identity()?, template.whole().pages)?;
        }
        Ok(Recording { path, known, recorder: template.record()?, until })
    }

    /// The sandbox is ready: writes down what is known so far, and goes on.
    pub fn ready(&self) {
        self.recorder.ready();
        if let Err(error) = self.save() {
            eprintln!("error: {error}");
        }
    }

    /// Writes the file: what was recorded so far, and what was known before.
    pub fn save(&self) -> Result<()> {
        let new = self.recorder.working_set(self.until);
        let set = match &self.known {
            Some(known) => known.union(&new)?,
            None => new,
        };
        set.save(&self.path)?;
        eprintln!(
            "pagekit: {}: {} pages, {} of them critical, of {} recordings",
            self.path.display(),
            set.pages(),
            set.critical_pages(),
            set.recordings()
        );
        Ok(())
    }
}
