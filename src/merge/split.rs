//! Split: queries, keys and values are projected apart and keys and values are cached, as trained
//! (arXiv 1706.03762; grouped queries: arXiv 2305.13245). Exact for every model.

use super::{Choice, Form, Site, Verdict};

pub(super) struct Split;

impl Form for Split {
    fn name(&self) -> &'static str {
        "split"
    }

    fn what(&self) -> &'static str {
        "queries, keys and values apart, as trained"
    }

    fn paper(&self) -> &'static str {
        "Vaswani et al. 2017, arXiv 1706.03762; grouped queries: Ainslie et al. 2023, arXiv 2305.13245"
    }

    fn applies(&self, _: &Choice, _: &Site) -> Verdict {
        Ok(())
    }

    fn exact(&self, _: &Choice, _: &Site) -> Verdict {
        Ok(())
    }
}
