#[hopline::service]
impl Demo for Calc {
    async fn add(&self) {}
}

fn main() {}
