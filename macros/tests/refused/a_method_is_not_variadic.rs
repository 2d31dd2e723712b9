#[hopline::service]
trait Demo {
    async fn put(&self, values: ...);
}

fn main() {}
