#[hopline::service]
trait Demo {
    async fn put(&self, text: Cow<'static, str>);
}

fn main() {}
