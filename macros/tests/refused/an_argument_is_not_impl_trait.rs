#[hopline::service]
trait Demo {
    async fn put(&self, text: impl Into<String>);
}

fn main() {}
